// Functions for Python in its limited API, so that one module serves every CPython from 3.10 on. Of what a binding
// library does, this is what two modules need: numbers, text and tuples in; None, a number or any object out.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace sdattn::python {

// A row of PyMethodDef: that function under this name.
template <auto function>
PyMethodDef method(const char* name);

// Other threads of Python run while this lives.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  ~WithoutLock() { PyEval_RestoreThread(state_); }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  PyThreadState* state_;
};

// Borrowed, as all that a call was given.
class Tuple {
 public:
  explicit Tuple(PyObject* object);
  bool empty() const { return PyTuple_Size(object_) == 0; }

  template <class T>
  T at(Py_ssize_t index) const;

 private:
  PyObject* object_;
};

// Thrown where Python's error is set already.
struct Raised {};

inline Tuple::Tuple(PyObject* object) : object_(object) {
  if (PyTuple_Check(object)) return;
  PyErr_SetString(PyExc_TypeError, "expected a tuple");
  throw Raised();
}

template <class T>
T value_of(PyObject* object) {
  if constexpr (std::is_same_v<T, Tuple>) {
    return Tuple(object);
  } else if constexpr (std::is_same_v<T, const char*>) {
    const char* text = PyUnicode_AsUTF8AndSize(object, nullptr);
    if (text == nullptr) throw Raised();
    return text;
  } else if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw Raised();
    return truth == 1;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) throw Raised();
    return static_cast<T>(number);
  } else {
    const long long number = PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred()) throw Raised();
    return static_cast<T>(number);
  }
}

template <class T>
T Tuple::at(Py_ssize_t index) const {
  PyObject* item = PyTuple_GetItem(object_, index);
  if (item == nullptr) throw Raised();
  return value_of<T>(item);
}

inline PyObject* object_of(PyObject* owned) { return owned; }
inline PyObject* object_of(bool truth) { return PyBool_FromLong(truth); }
inline PyObject* object_of(int64_t number) { return PyLong_FromLongLong(number); }

template <auto function, class Result, class... Arguments, size_t... I>
PyObject* apply(Result (*)(Arguments...), PyObject* const* given, Py_ssize_t count, std::index_sequence<I...>) {
  constexpr Py_ssize_t expected = sizeof...(Arguments);
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    throw Raised();
  }
  if constexpr (std::is_void_v<Result>) {
    function(value_of<std::decay_t<Arguments>>(given[I])...);
    Py_IncRef(Py_None);
    return Py_None;
  } else {
    return object_of(function(value_of<std::decay_t<Arguments>>(given[I])...));
  }
}

template <class Result, class... Arguments>
constexpr auto indices(Result (*)(Arguments...)) {
  return std::index_sequence_for<Arguments...>();
}

template <auto function>
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) noexcept {
  try {
    return apply<function>(function, given, count, indices(function));
  } catch (const Raised&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto function>
PyMethodDef method(const char* name) {
  // Python keeps functions of all calling conventions as one type.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function>)), METH_FASTCALL, nullptr};
}

}  // namespace sdattn::python
