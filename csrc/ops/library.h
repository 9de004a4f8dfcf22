// Registration: an op is a schema and a CPU kernel, declared where the kernel is.
#pragma once
#include "box.h"

namespace omniconv {

// Returns the library handle that schemas are defined through: one in a process, whatever file registers first.
inline TorchLibraryHandle schema_library() {
  static TorchLibraryHandle library = [] {
    TorchLibraryHandle handle;
    TORCH_OK(aoti_torch_library_init_def("omniconv", __FILE__, __LINE__, &handle));
    return handle;
  }();
  return library;
}

// Returns the library handle that CPU kernels are registered through.
inline TorchLibraryHandle kernel_library() {
  static TorchLibraryHandle library = [] {
    TorchLibraryHandle handle;
    TORCH_OK(aoti_torch_library_init_impl("omniconv", "CPU", __FILE__, __LINE__, &handle));
    return handle;
  }();
  return library;
}

// Registers the function F as the op of a schema.
template <auto F> struct Register {
  explicit Register(const char* schema) {
    constexpr uint64_t kBuiltFor = (2ULL << 56) | (10ULL << 48);  // the calling conventions of torch 2.10
    Boxed<F>::schema = schema;
    TORCH_OK(aoti_torch_library_def(schema_library(), schema));
    TORCH_OK(torch_library_impl(kernel_library(), schema_name(schema).c_str(), &Boxed<F>::call, kBuiltFor));
  }
};

}  // namespace omniconv
