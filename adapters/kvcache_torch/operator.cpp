// `kvcache::linear_few`, what `linear.c` does as an operator of PyTorch: a compiled decode step calls it for every linear
// layer, and need not go through Python and ctypes each time.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <exception>
#include <memory>
#include <optional>

extern "C" void kvcache_linear(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
                               int64_t in, int64_t out);

namespace {

using Bias = std::optional<at::Tensor>;

constexpr int64_t kFew = 8;  // rows for which no other way is faster, packed weights or not: see linear.py

at::Tensor linear(const at::Tensor &x, const at::Tensor &weight, const Bias &bias) {
    const int64_t out = weight.size(0), in = weight.size(-1);
    const bool contiguous = x.is_contiguous() && weight.is_contiguous() && (!bias || bias->is_contiguous());
    const bool fits = weight.dim() == 2 && x.size(-1) == in && (!bias || (bias->dim() == 1 && bias->size(0) == out));
    if (!contiguous || !fits || in == 0 || x.numel() > kFew * in) {
        static const auto any = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("kvcache::linear", "")
                                    .typed<at::Tensor(const at::Tensor &, const at::Tensor &, const Bias &)>();
        return any.call(x, weight, bias);
    }
    auto shape = x.sizes().vec();
    shape.back() = out;
    at::Tensor y = at::empty(shape, x.options());
    kvcache_linear(x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                   bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), x.numel() / in, in, out);
    return y;
}

}  // namespace

// Whether it is there from now on. Called once, and not when the library is loaded: a second time would be an error.
extern "C" int kvcache_define_operator() {
    try {
        static torch::Library library(torch::Library::FRAGMENT, "kvcache", std::nullopt, __FILE__, __LINE__);
        static torch::Library cpu(torch::Library::IMPL, "kvcache", c10::DispatchKey::CPU, __FILE__, __LINE__);
        library.def("linear_few(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
        cpu.impl("linear_few", linear);
        return 1;
    } catch (const std::exception &) {
        return 0;
    }
}
