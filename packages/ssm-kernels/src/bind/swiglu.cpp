// Python binding of the SwiGLU activation.
#include <ssm/swiglu.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "swiglu";

void forward(const Input& gate, const Input& up, const Output& y, int num_threads,
             std::intptr_t stream) {
    const SwigluArgs args{
        .gate = view(kOp, "gate", gate), .up = view(kOp, "up", up), .y = view(kOp, "y", y)};
    const nb::gil_scoped_release unlocked;
    swiglu_fwd(args, {.num_threads = num_threads, .stream = stream});
}

void backward(const Input& gate, const Input& up, const Input& dy, const Output& dgate,
              const Output& dup, int num_threads, std::intptr_t stream) {
    const SwigluArgs args{.gate = view(kOp, "gate", gate), .up = view(kOp, "up", up)};
    const SwigluGrads grads{.dy = view(kOp, "dy", dy),
                            .dgate = view(kOp, "dgate", dgate),
                            .dup = view(kOp, "dup", dup)};
    const nb::gil_scoped_release unlocked;
    swiglu_bwd(args, grads, {.num_threads = num_threads, .stream = stream});
}

}  // namespace

void register_swiglu(nb::module_& module) {
    const auto none = nb::none();
    module.def("swiglu_fwd", &forward, "gate"_a.none(), "up"_a = none, nb::kw_only(), "y"_a.none(),
               "num_threads"_a = 0, "stream"_a = 0,
               R"(Write y = silu(gate) up: Shazeer 2020, arXiv:2002.05202, eq. 5.

Args:
    gate: (..., D), up to 6 axes, float64 | float32 | bfloat16 | float16, any strides; without up
        (..., 2 D), the gate in the first half, up in the second.
    up: (..., D), any of these dtypes.
    y: (..., D). Output; written completely.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
    module.def("swiglu_bwd", &backward, "gate"_a.none(), "up"_a = none, nb::kw_only(),
               "dy"_a.none(), "dgate"_a.none(), "dup"_a = none, "num_threads"_a = 0, "stream"_a = 0,
               R"(Gradients of swiglu_fwd.

Args:
    gate, up: as the forward got them.
    dy: (..., D). Gradient of y.
    dgate: as gate in shape. Output.
    dup: as up in shape. Output; None without up, whose gradient is then the second half of dgate.

Raises:
    ValueError, TypeError: as swiglu_fwd.
)");
}

}  // namespace ssm::bind
