// From the dispatcher's stack to C++ arguments and back: handles are owned from the first line, so that no exception
// leaks one.
#pragma once
#include <atomic>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_c.h"

namespace omniconv {

inline void throw_on_error(AOTITorchError error, const char* call) {
  if (error)
    throw std::runtime_error("torch: the call must succeed, got an error from " +
                             std::string(call, std::strcspn(call, "(")));
}
#define TORCH_OK(call) ::omniconv::throw_on_error((call), #call)

// A tensor, which owns its handle, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    if (!handle) return;
    int64_t dim, *sizes, *strides;
    TORCH_OK(aoti_torch_get_dim(handle, &dim));
    TORCH_OK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_OK(aoti_torch_get_strides(handle, &strides));
    TORCH_OK(aoti_torch_get_dtype(handle, &dtype_));
    size_.assign(sizes, sizes + dim);
    stride_.assign(strides, strides + dim);
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dtype_, other.dtype_);
    std::swap(size_, other.size_);
    std::swap(stride_, other.stride_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  // Returns a new tensor of the CPU, not initialised; none if torch cannot allocate it.
  static Tensor try_empty(const std::vector<int64_t>& size, const std::vector<int64_t>& stride, int32_t dtype) {
    AtenTensorHandle handle = nullptr;
    const AOTITorchError error = aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(), dtype,
                                                          aoti_torch_device_type_cpu(), 0, &handle);
    return Tensor(error ? nullptr : handle);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  const std::vector<int64_t>& size() const { return size_; }
  const std::vector<int64_t>& stride() const { return stride_; }
  int64_t size(size_t axis) const { return size_[axis]; }
  int64_t dim() const { return int64_t(size_.size()); }
  int32_t dtype() const { return dtype_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : size_) n *= s;
    return n;
  }
  void* data() const {
    void* p;
    TORCH_OK(aoti_torch_get_data_ptr(handle_, &p));
    return p;
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
  int32_t dtype_ = 0;
  std::vector<int64_t> size_, stride_;
};

using Ints = std::vector<int64_t>;

template <class T> struct Unbox;
template <> struct Unbox<Tensor> {
  static Tensor from(StableIValue v) { return Tensor(reinterpret_cast<AtenTensorHandle>(v)); }
};
struct OptionalTensor : Tensor {
  using Tensor::Tensor;
  OptionalTensor(Tensor&& t) : Tensor(std::move(t)) {}
};
template <> struct Unbox<OptionalTensor> {
  static OptionalTensor from(StableIValue v) {
    if (!v) return {};
    auto* boxed = reinterpret_cast<StableIValue*>(v);  // 2.10's rule: a value of its own on the heap, ours to delete
    const StableIValue inner = *boxed;
    delete boxed;
    return Tensor(reinterpret_cast<AtenTensorHandle>(inner));
  }
};
template <> struct Unbox<int64_t> {
  static int64_t from(StableIValue v) { return int64_t(v); }
};
template <> struct Unbox<bool> {
  static bool from(StableIValue v) { return (v & 0xff) != 0; }
};
template <> struct Unbox<Ints> {
  static Ints from(StableIValue v) {
    auto list = reinterpret_cast<StableListHandle>(v);
    struct Owner {
      StableListHandle list;
      ~Owner() { torch_delete_list(list); }
    } owner{list};
    size_t n;
    TORCH_OK(torch_list_size(list, &n));
    Ints ints(n);
    for (size_t i = 0; i < n; ++i) {
      StableIValue item;
      TORCH_OK(torch_list_get_item(list, i, &item));
      ints[i] = int64_t(item);
    }
    return ints;
  }
};

inline void push_results(StableIValue* stack, Tensor result) {
  stack[0] = reinterpret_cast<StableIValue>(result.release());
}
inline void push_results(StableIValue* stack, std::pair<Tensor, Tensor> results) {
  stack[0] = reinterpret_cast<StableIValue>(results.first.release());
  stack[1] = reinterpret_cast<StableIValue>(results.second.release());
}

// Returns the name of the op that a schema declares.
inline std::string schema_name(const char* schema) { return std::string(schema, std::strcspn(schema, "(")); }

// The boxed form of a C++ function of tensors and numbers.
template <auto F> struct Boxed;
template <class R, class... Args, R (*F)(Args...)> struct Boxed<F> {
  static inline const char* schema = "";  // that it was registered with: errors begin with its name

  static void call(StableIValue* stack, uint64_t, uint64_t) {
    try {
      run(stack, std::index_sequence_for<Args...>{});
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(schema_name(schema) +
                               ": its working space must fit into memory, got an allocation failure");
    }
  }
  template <size_t... I> static void run(StableIValue* stack, std::index_sequence<I...>) {
    // every argument is owned before anything is checked; braces fix the order
    std::tuple<std::decay_t<Args>...> args{Unbox<std::decay_t<Args>>::from(stack[I])...};
    if constexpr (std::is_void_v<R>) F(std::get<I>(args)...);
    else push_results(stack, F(std::get<I>(args)...));
  }
};

// Calls f(first, last) for parts of [0, n), of about `grain` or more, in torch's threads. What f throws is thrown here:
// torch's ABI would only tell that something was.
template <class F> void parallel_for(int64_t n, int64_t grain, const F& f) {
  struct Context {
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error{};
  } context{f};
  const ParallelFunc part = [](int64_t first, int64_t last, void* data) {
    auto& context = *static_cast<Context*>(data);
    try {
      context.f(first, last);
    } catch (...) {
      if (!context.failed.test_and_set()) context.error = std::current_exception();
    }
  };
  TORCH_OK(torch_parallel_for(0, n, grain, part, &context));
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace omniconv
