// How arguments cross from Python: a pointer as an integer, a struct within a struct as a tuple.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

#include "layer.h"

namespace bertfast {

namespace py = pybind11;

template <class T>
struct Cross {
  using Type = T;
  static T arrived(T value) { return value; }
};
template <class T>
struct Cross<T*> {
  using Type = std::uintptr_t;
  static T* arrived(std::uintptr_t value) { return reinterpret_cast<T*>(value); }
};
template <class Struct, class... T>
struct CrossAsTuple {
  using Type = std::tuple<typename Cross<T>::Type...>;
  static Struct arrived(const Type& values) {
    return std::apply([](const auto&... v) { return Struct{Cross<T>::arrived(v)...}; }, values);
  }
};
template <>
struct Cross<Parameter> : CrossAsTuple<Parameter, const void*, const void*> {};
template <>
struct Cross<Bias> : CrossAsTuple<Bias, const void*, int64_t, int64_t, int64_t, int> {};

template <class T>
using Crossing = typename Cross<T>::Type;

// A keyword that makes a field of a struct; an optional one is all zeros where it is left out.
template <class Struct, class T, bool optional>
struct Field {
  const char* name;
  T Struct::* member;

  auto argument() const {
    if constexpr (optional)
      return py::arg(name) = Crossing<T>{};
    else
      return py::arg(name);
  }
};
template <class Struct, class T>
Field<Struct, T, false> field(const char* name, T Struct::* member) {
  return {name, member};
}
template <class Struct, class T>
Field<Struct, T, true> optional(const char* name, T Struct::* member) {
  return {name, member};
}

template <class Struct, class... T, bool... may_lack>
void bind_struct(py::module_& m, const char* name, const Field<Struct, T, may_lack>&... fields) {
  const auto make = [fields...](Crossing<T>... values) {
    Struct made{};
    ((made.*fields.member = Cross<T>::arrived(values)), ...);
    return made;
  };
  py::class_<Struct>(m, name).def(py::init(make), py::kw_only(), fields.argument()...);
}

}  // namespace bertfast
