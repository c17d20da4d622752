// bce_auc_direct.cpp - the loss of an eager step on the CPU as two Python functions, past torch's dispatcher.
//
// At a batch of 32 the way through the dispatcher costs several times the arithmetic. These functions take their
// tensors by DLPack's C exchange (torch.Tensor.__dlpack_c_exchange_api__) and give the operators' bits, for what a
// training step has: torch.Tensor itself, on the CPU, float32. Whatever else comes they leave alone and say None: then
// the operators of bce_auc_op.cpp do it, or refuse it. What cannot be seen here, modes and negated views, cxrfast/
// loss_op.py asks before. Python's limited API only: one binary for every Python from 3.10 on.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "bce_auc_cpu.h"
#include "bce_auc_op.h"
#include "dlpack_exchange.h"

namespace cxrfast {
namespace {

const dlpack::Exchange* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;  // torch.Tensor

// Reads a tensor of this rank and type (32-bit float or 64-bit int) and no other. It is borrowed from `object`.
bool read(PyObject* object, int ndim, uint8_t type, dlpack::View* tensor) {
  if (Py_TYPE(object) != tensor_type) return false;
  if (exchange->view(object, tensor) != 0) {
    PyErr_Clear();  // it has no strides or no memory
    return false;
  }
  return tensor->device_type == dlpack::kCpu && tensor->ndim == ndim && tensor->type_code == type &&
         tensor->type_nbits == (type == dlpack::kInt ? 64 : 32) && tensor->type_lanes == 1 && tensor->data &&
         (ndim == 0 || tensor->strides);
}

template <class T>
T* data_of(const dlpack::View& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.offset_nbytes);
}

// Reads (C,) or None.
bool read_weight(PyObject* object, int64_t C, const float** values, int64_t* stride) {
  dlpack::View tensor;
  if (object == Py_None) return true;
  if (!read(object, 1, dlpack::kFloat, &tensor) || tensor.shape[0] != C) return false;
  *values = data_of<const float>(tensor);
  *stride = tensor.strides[0];
  return true;
}

bool read_counts(PyObject* object, int64_t C, int64_t** counts) {
  dlpack::View tensor;
  if (object == Py_None) return true;
  if (!read(object, 3, dlpack::kInt, &tensor)) return false;
  *counts = data_of<int64_t>(tensor);
  return tensor.shape[0] == C && tensor.shape[1] == 2 && tensor.shape[2] == kCodes &&
         (C == 1 || tensor.strides[0] == 2 * kCodes) && tensor.strides[1] == kCodes && tensor.strides[2] == 1;
}

bool read_batch(PyObject* const* arguments, BceAucBatch* batch) {
  dlpack::View logits, targets;
  if (!read(arguments[0], 2, dlpack::kFloat, &logits) || !read(arguments[1], 2, dlpack::kFloat, &targets)) return false;
  batch->N = logits.shape[0];
  batch->C = logits.shape[1];
  if (targets.shape[0] != batch->N || targets.shape[1] != batch->C) return false;
  batch->logits = data_of<const float>(logits);
  batch->targets = data_of<const float>(targets);
  for (int i = 0; i < 2; ++i) {
    batch->logits_stride[i] = logits.strides[i];
    batch->targets_stride[i] = targets.strides[i];
  }
  return read_weight(arguments[2], batch->C, &batch->pos_weight, &batch->pos_weight_stride) &&
         read_weight(arguments[3], batch->C, &batch->class_weight, &batch->class_weight_stride) &&
         read_counts(arguments[4], batch->C, &batch->counts);
}

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// A new contiguous float32 tensor and its memory; null with a Python error set.
PyObject* new_tensor(int ndim, int64_t* shape, void** data) {
  dlpack::View prototype{};
  prototype.device_type = dlpack::kCpu;
  prototype.ndim = ndim;
  prototype.type_code = dlpack::kFloat;
  prototype.type_nbits = 32;
  prototype.type_lanes = 1;
  prototype.shape = shape;
  dlpack::Owned* tensor = nullptr;
  if (exchange->allocate(&prototype, &tensor, nullptr, set_error) != 0) return nullptr;
  *data = data_of<void>(tensor->view);
  void* object = nullptr;
  if (exchange->to_py_object(tensor, &object) != 0) return nullptr;
  return static_cast<PyObject*>(object);
}

PyObject* bce_auc(PyObject*, PyObject* const* arguments, Py_ssize_t n_arguments) {
  BceAucBatch batch{};
  if (n_arguments != 5 || !read_batch(arguments, &batch)) Py_RETURN_NONE;
  int64_t shape[2] = {batch.N, batch.C};
  void* mean;
  PyObject* grad = new_tensor(2, shape, &batch.grad);
  PyObject* loss = grad ? new_tensor(0, shape, &mean) : nullptr;
  if (!loss) {
    Py_XDECREF(grad);
    return nullptr;
  }
  const int threads = int(torch::stable::get_num_threads());
  BceAucSums sums;
  if (batch.N * batch.C < kThreadedEntries) {
    sums = bce_auc_cpu<float>(batch, 1, parallel_for);
  } else {
    PyThreadState* state = PyEval_SaveThread();
    sums = bce_auc_cpu<float>(batch, threads, parallel_for);
    PyEval_RestoreThread(state);
  }
  *static_cast<float*>(mean) = float(sums.mean());
  return Py_BuildValue("(NNL)", loss, grad, static_cast<long long>(sums.known));
}

PyObject* scale_grad(PyObject*, PyObject* const* arguments, Py_ssize_t n_arguments) {
  dlpack::View grad_loss, grad;
  if (n_arguments != 3 || !read(arguments[0], 0, dlpack::kFloat, &grad_loss) ||
      !read(arguments[1], 2, dlpack::kFloat, &grad))
    Py_RETURN_NONE;
  const BceAucSums sums{0, PyLong_AsLongLong(arguments[2])};
  void* values = data_of<void>(grad);
  scale_grad_cpu<float>(values, sums.scale(*data_of<float>(grad_loss)), values, grad.shape[0] * grad.shape[1]);
  return Py_NewRef(arguments[1]);
}

PyMethodDef functions[] = {
    {"bce_auc", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bce_auc)), METH_FASTCALL,
     "bce_auc(logits, targets, pos_weight, class_weight, counts) -> (loss, grad, known) of the operator "
     "weighted_bce_auc, known as an int; None where it is the operator's case."},
    {"scale_grad", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(scale_grad)), METH_FASTCALL,
     "scale_grad(grad_loss, grad, known) -> grad, multiplied in place by grad_loss / known; None where it is the case "
     "of the operator weighted_bce_auc_backward."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_loss", "The loss past the dispatcher.", -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace cxrfast

// ImportError where torch has no such exchange: then there are the operators alone.
PyMODINIT_FUNC PyInit__loss() {
  using namespace cxrfast;
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  const void* api = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  exchange = static_cast<const dlpack::Exchange*>(api);
  tensor_type = reinterpret_cast<PyTypeObject*>(type);  // kept for good
  Py_XDECREF(capsule);                                  // torch keeps what it points to
  Py_XDECREF(torch);
  if (!exchange || exchange->version.major != dlpack::kMajorVersion || !exchange->view) {
    PyErr_Clear();
    PyErr_SetString(PyExc_ImportError, "this torch does not offer DLPack's C exchange");
    return nullptr;
  }
  return PyModule_Create(&module);
}
