// dlpack_exchange.h - the part of DLPack's C interface (1.2 and later of major version 1) that bce_auc_direct.cpp uses.
// The layouts are DLPack's, fixed for its major version; torch's own header of them refuses stable-ABI builds.
#pragma once

#include <cstdint>

namespace cxrfast::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;              // device types
constexpr uint8_t kInt = 0, kFloat = 2;  // type codes

struct Version {
  uint32_t major, minor;
};

struct View {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t type_code, type_nbits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t offset_nbytes;
};

struct Owned {
  Version version;
  void* owner;
  void (*destroy)(Owned*);
  uint64_t flags;
  View view;
};

// What the capsule torch.Tensor.__dlpack_c_exchange_api__, named "dlpack_exchange_api", points to. Every function
// returns 0, or another number with a Python error set; `allocate` hands that error to set_error.
struct Exchange {
  Version version;
  const void* older;
  int (*allocate)(View* prototype, Owned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*own)(void* py_object, Owned** out);
  int (*to_py_object)(Owned* tensor, void** out);
  int (*view)(void* py_object, View* out);  // may be null; borrowed from py_object
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace cxrfast::dlpack
