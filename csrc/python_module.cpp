// Makes the operator library importable: loading it is what registers the operators.
#include <Python.h>

#include <exception>

#include "cpu/simd/instruction_set.h"

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(lambda_return::cpu::instruction_set().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set that the CPU kernels use."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
