// Registration: an op is a schema and a CPU kernel, declared where the kernel is.
#pragma once
#include "box.h"

namespace omniconv {

struct Register {
  Register(const char* schema, const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    constexpr uint64_t kBuiltFor = (2ULL << 56) | (10ULL << 48);  // the calling conventions of torch 2.10
    // one library handle of each kind for the life of the process; the order in which files register does not matter
    static TorchLibraryHandle definitions = [] {
      TorchLibraryHandle h;
      TORCH_OK(aoti_torch_library_init_def("omniconv", __FILE__, __LINE__, &h));
      return h;
    }();
    static TorchLibraryHandle kernels = [] {
      TorchLibraryHandle h;
      TORCH_OK(aoti_torch_library_init_impl("omniconv", "CPU", __FILE__, __LINE__, &h));
      return h;
    }();
    TORCH_OK(aoti_torch_library_def(definitions, schema));
    TORCH_OK(torch_library_impl(kernels, name, kernel, kBuiltFor));
  }
};

}  // namespace omniconv
