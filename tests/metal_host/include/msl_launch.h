// From the runtime's arguments to a kernel's parameters; threadgroup variables.
#pragma once

namespace msl {

// One byte per threadgroup variable: its address names the variable to the runtime.
template <class T, int ID> inline char variable_site;
template <class T, int ID>
T& threadgroup_variable(const char* name) {
  return *static_cast<T*>(
      msl_rt_threadgroup(&variable_site<T, ID>, sizeof(T), alignof(T), name));
}

// signature.py writes one for each parameter: the numbers are those of its tables.
enum parameter_kind { kBuffer, kThreadgroupArgument, kBuiltin };
struct parameter { int kind, index; };

inline uint3 position_in_grid(const msl_builtins& b) {
  uint3 result(0);
  for (int k = 0; k < 3; k++) result[k] = b.threadgroup[k] * b.full_size[k] + b.thread[k];
  return result;
}
inline uint3 triple(const msl_u32* p) { return uint3(p[0], p[1], p[2]); }

inline uint3 builtin(int index) {
  const msl_builtins& b = *msl_rt_builtins();
  switch (index) {
    case 0: return position_in_grid(b);
    case 1: return triple(b.thread);
    case 2: return triple(b.threadgroup);
    case 3: return triple(b.size);
    case 4: return triple(b.full_size);
    case 5: return triple(b.grid);
    case 6: return triple(b.threadgroups);
    case 7: return uint3(b.linear);
    case 8: return uint3(b.simdgroup);
    case 9: return uint3(b.lane);
    case 10: return uint3(b.simdgroups);
    case 11: return uint3(32);
    case 12: return uint3(b.linear / 4);
    case 13: return uint3(b.linear % 4);
    case 14: return uint3(b.simdgroups * 8);
    case 15: return uint3(0);
    case 16: return uint3(b.full_simdgroups);
    case 17: return uint3(b.full_simdgroups * 8);
  }
  __builtin_trap();
}

template <class P>
struct argument {
  static P get(parameter p, void* const*) { return P(builtin(p.index).x); }
};
template <class T>
struct argument<T*> {
  static T* get(parameter p, void* const* buffers) {
    void* at = p.kind == kThreadgroupArgument ? msl_rt_threadgroup_argument(p.index)
                                              : buffers[p.index];
    return static_cast<T*>(at);
  }
};
template <class T>
struct argument<T&> {
  static T& get(parameter p, void* const* buffers) { return *static_cast<T*>(buffers[p.index]); }
};
template <class T>
struct argument<vec<T, 3>> {
  static vec<T, 3> get(parameter p, void* const*) { return vec<T, 3>(builtin(p.index)); }
};
template <>
struct argument<uint3> {
  static uint3 get(parameter p, void* const*) { return builtin(p.index); }
};
template <class T>
struct argument<vec<T, 2>> {
  static vec<T, 2> get(parameter p, void* const*) {
    uint3 v = builtin(p.index);
    return vec<T, 2>(T(v.x), T(v.y));
  }
};

template <int... I> struct indices {};
template <int N, int... I> struct make_indices : make_indices<N - 1, N - 1, I...> {};
template <int... I> struct make_indices<0, I...> { using type = indices<I...>; };

template <class... P, int... I>
void call(void (*function)(P...), const parameter* p, void* const* buffers, indices<I...>) {
  function(argument<P>::get(p[I], buffers)...);
}
template <class... P>
void invoke(void (*function)(P...), const parameter* p, void* const* buffers) {
  call(function, p, buffers, typename make_indices<sizeof...(P)>::type{});
}

}  // namespace msl
