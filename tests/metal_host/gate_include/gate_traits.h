// metal_type_traits for the gate: a type may carry an address space, which the traits take off.
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

template <class T> struct remove_addrspace { using type = T; };
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
#define GATE_SPACE(space)                                                              \
  template <class T> struct remove_addrspace<space T> { using type = T; };             \
  template <class T> struct remove_addrspace<const space T> { using type = const T; }; \
  template <class T> struct remove_reference<space T&> { using type = T; };
GATE_SPACE(__global)
GATE_SPACE(__local)
GATE_SPACE(__constant)
GATE_SPACE(__private)
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;

template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T>
struct remove_cv {
  using type =
      typename remove_const<typename remove_volatile<remove_addrspace_t<T>>::type>::type;
};
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;

template <class T, class U> struct is_same : false_type {};
template <class T> struct is_same<T, T> : true_type {};
template <class T, class U> constexpr bool is_same_v = __is_same(T, U);
using bfloat = __bf16;  // that conversions are written out is for the host's bfloat to check
template <class T> constexpr bool is_integral_v = __is_integral(remove_cv_t<T>);
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_floating_point_v =
    __is_floating_point(remove_cv_t<T>) || __is_same(remove_cv_t<T>, bfloat);
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> constexpr bool is_scalar_v = is_arithmetic_v<T>;
template <class T> constexpr bool is_unsigned_v = is_integral_v<T> && (T(-1) > T(0));
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T> constexpr bool is_signed_v = is_arithmetic_v<T> && !is_unsigned_v<T>;
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};
template <class F, class T> constexpr bool is_convertible_v = __is_convertible_to(F, T);
template <class F, class T> struct is_convertible : bool_constant<is_convertible_v<F, T>> {};

template <class T> struct make_unsigned { using type = T; };
template <> struct make_unsigned<char> { using type = uchar; };
template <> struct make_unsigned<short> { using type = ushort; };
template <> struct make_unsigned<int> { using type = uint; };
template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;

template <class... A> struct conjunction : bool_constant<(bool(A::value) && ...)> {};
template <class... A> struct disjunction : bool_constant<(bool(A::value) || ...)> {};
template <class A> struct negation : bool_constant<!A::value> {};
template <class... A> using _disjunction = disjunction<A...>;

template <class T>
struct numeric_limits {  // values do not matter: nothing is run
  static constexpr bool is_signed = true;
  static constexpr int digits = 8;
  static constexpr T min() { return T(0); }
  static constexpr T max() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
  static constexpr T epsilon() { return T(0); }
};

template <class T> using gate_if_number = enable_if_t<is_arithmetic_v<T>>;
template <class T>
using gate_if_plain = enable_if_t<is_arithmetic_v<T> && !__is_same(T, bfloat)>;
template <class To, class From, class = enable_if_t<sizeof(To) == sizeof(From)>>
To as_type(From value);

}  // namespace metal
