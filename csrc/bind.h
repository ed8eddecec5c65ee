// How arguments cross from Python: a pointer as an integer, a struct within a struct as a tuple.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace bertfast {

namespace py = pybind11;

// Around kernels: without Python's lock, and with as many OpenMP threads as torch would take in
// this thread, whose number torch sets where it is first asked there.
class Running {
 public:
  Running() {
    static thread_local const int threads =
        py::module_::import("torch").attr("get_num_threads")().cast<int>();
    (void)threads;
    released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

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
template <>
struct Cross<Precision> {
  using Type = int;
  static Precision arrived(int value) { return Precision(value); }
};
// A list of pointers.
template <class Struct, class T>
struct CrossAsList {
  using Type = std::vector<std::uintptr_t>;
  static Struct arrived(const Type& values) {
    Struct made{{}, int(values.size())};
    if (values.size() > std::size(made.data)) throw std::invalid_argument("more than three parts");
    std::transform(values.begin(), values.end(), made.data, Cross<T>::arrived);
    return made;
  }
};
template <>
struct Cross<Parts> : CrossAsList<Parts, const void*> {};
template <>
struct Cross<Angles> : CrossAsList<Angles, const float*> {};
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
template <>
struct Cross<Dropout> : CrossAsTuple<Dropout, const int64_t*, float, uint32_t> {};

template <class T>
using Crossing = typename Cross<T>::Type;

// A function of these fields of a struct, in their order; it gets the struct, all else in it zero.
template <auto... fields>
struct Fields {
  template <auto... more>
  constexpr Fields<fields..., more...> operator+(Fields<more...>) const {
    return {};
  }
};
template <class Struct, class T>
T member_type(T Struct::*);
template <auto field>
using Member = decltype(member_type(field));

template <class Struct, auto... fields, class Function>
auto from_fields(Fields<fields...>, const Function& function) {
  return [function](const Crossing<Member<fields>>&... values) {
    Struct made{};
    ((made.*fields = Cross<Member<fields>>::arrived(values)), ...);
    return function(made);
  };
}

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
  const auto make = [fields...](const Crossing<T>&... values) {
    Struct made{};
    ((made.*fields.member = Cross<T>::arrived(values)), ...);
    return made;
  };
  py::class_<Struct>(m, name).def(py::init(make), py::kw_only(), fields.argument()...);
}

}  // namespace bertfast
