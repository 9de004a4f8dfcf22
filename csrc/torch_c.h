// The part of libtorch's stable C ABI that this library uses: all of it is exported by torch 2.10 and later. It is
// declared here so that the build needs no torch; tests/engines/test_library.py compiles these declarations together
// with torch's own, so that they cannot disagree. CMake makes the linker's stub from them: each stands in one line.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
using ParallelFunc = void (*)(int64_t, int64_t, void*);

// clang-format off
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t), uint64_t);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_device_type_cpu();
AOTITorchError torch_parallel_for(int64_t, int64_t, int64_t, ParallelFunc, void*);
AOTITorchError torch_list_size(StableListHandle, size_t*);
AOTITorchError torch_list_get_item(StableListHandle, size_t, StableIValue*);
AOTITorchError torch_delete_list(StableListHandle);
// clang-format on
}
