// metal_type_traits, with no C++ headers: kernel text may use names that they would break on.
#pragma once

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T>
struct remove_cv { using type = typename remove_const<typename remove_volatile<T>::type>::type; };
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> using remove_addrspace_t = remove_cv_t<T>;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;

template <class T, class U> struct is_same : false_type {};
template <class T> struct is_same<T, T> : true_type {};
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T*> : true_type {};
template <class T> constexpr bool is_pointer_v = is_pointer<remove_cv_t<T>>::value;
template <class T> struct is_reference : false_type {};
template <class T> struct is_reference<T&> : true_type {};
template <class T> struct is_enum : bool_constant<__is_enum(T)> {};
template <class T> struct is_class : bool_constant<__is_class(T)> {};
template <class B, class D> struct is_base_of : bool_constant<__is_base_of(B, D)> {};
template <class T> T&& declval() noexcept;

struct bfloat;
template <class T, class... Ts> constexpr bool msl_one_of = (is_same_v<T, Ts> || ...);
template <class T>
constexpr bool is_integral_v =
    msl_one_of<remove_cv_t<T>, bool, char, signed char, unsigned char, short, unsigned short, int,
               unsigned, long, unsigned long, long long, unsigned long long>;
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_floating_point_v = msl_one_of<remove_cv_t<T>, float, half, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> constexpr bool is_scalar_v = is_arithmetic_v<T>;

template <class T> constexpr bool msl_is_unsigned() {
  if constexpr (is_integral_v<T>) return T(-1) > T(0);
  return false;
}
template <class T> constexpr bool is_unsigned_v = msl_is_unsigned<T>();
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T> constexpr bool is_signed_v = is_arithmetic_v<T> && !is_unsigned_v<T>;
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};

template <class T> struct make_unsigned { using type = T; };
template <> struct make_unsigned<char> { using type = uchar; };
template <> struct make_unsigned<signed char> { using type = uchar; };
template <> struct make_unsigned<short> { using type = ushort; };
template <> struct make_unsigned<int> { using type = uint; };
template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;

template <class From, class To>
struct is_convertible {
  static true_type accept(To);
  template <class X> static decltype(accept(declval<X>())) test(int);
  template <class> static false_type test(...);
  static constexpr bool value = decltype(test<From>(0))::value;
};
template <class F, class T> constexpr bool is_convertible_v = is_convertible<F, T>::value;

template <class... A> struct conjunction : bool_constant<(bool(A::value) && ...)> {};
template <class... A> struct disjunction : bool_constant<(bool(A::value) || ...)> {};
template <class A> struct negation : bool_constant<!A::value> {};
template <class... A> using _conjunction = conjunction<A...>;
template <class... A> using _disjunction = disjunction<A...>;

template <class T> using msl_if_number = enable_if_t<is_arithmetic_v<T>>;
template <class T> using msl_if_integer = enable_if_t<is_integral_v<T>>;
template <class T>  // numbers that the library's own functions take: not bfloat
using msl_if_plain = enable_if_t<is_arithmetic_v<T> && !is_same_v<T, bfloat>>;

template <class To, class From>
constexpr To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  if constexpr (__is_trivially_copyable(To) && __is_trivially_copyable(From)) {
    return __builtin_bit_cast(To, value);
  } else {  // vectors in mode count
    To result;
    __builtin_memcpy((void*)&result, (const void*)&value, sizeof result);
    return result;
  }
}

}  // namespace metal
