// Python binding of the step.
#include <ssm/selective_state_step.h>

#include "tensor_arg.h"

namespace ssm::bind {

using namespace nb::literals;

namespace {

constexpr const char* kOp = "selective_state_step";

void forward(const Output& state, const Input& x, const Input& dt, const Input& A, const Input& B,
             const Input& C, const Input& D, const Input& z, const Input& dt_bias,
             const Input& state_indices, const Output& y, bool softplus, int num_threads,
             std::intptr_t stream) {
    const SelectiveStateStepArgs args{.state = view(kOp, "state", state),
                                      .x = view(kOp, "x", x),
                                      .dt = view(kOp, "dt", dt),
                                      .A = view(kOp, "A", A),
                                      .B = view(kOp, "B", B),
                                      .C = view(kOp, "C", C),
                                      .D = view(kOp, "D", D),
                                      .z = view(kOp, "z", z),
                                      .dt_bias = view(kOp, "dt_bias", dt_bias),
                                      .state_indices = view(kOp, "state_indices", state_indices),
                                      .y = view(kOp, "y", y),
                                      .softplus = softplus};
    const nb::gil_scoped_release unlocked;
    selective_state_step_fwd(args, {.num_threads = num_threads, .stream = stream});
}

}  // namespace

void register_selective_state_step(nb::module_& module) {
    const auto none = nb::none();
    module.def(
        "selective_state_step_fwd", &forward, "state"_a.none(), "x"_a.none(), "dt"_a.none(),
        "A"_a.none(), "B"_a.none(), "C"_a.none(), "D"_a = none, "z"_a = none, "dt_bias"_a = none,
        "state_indices"_a = none, nb::kw_only(), "y"_a.none(), "softplus"_a = true,
        "num_threads"_a = 0, "stream"_a = 0,
        R"(Advance the selective recurrence by one token, or a few, updating the state in place.

h = exp(dt A) h + dt B x and y = (sum_n C h + D x) silu(z) with dt = softplus(dt + dt_bias):
Gu & Dao 2023, arXiv:2312.00752, eq. 2-4; Dao & Gu 2024, arXiv:2405.21060, eq. 1.

Args:
    state: (R, D, N) or (R, H, P, N), float64 | float32 | bfloat16 | float16, any strides. Updated
        in place, rounded to its dtype once per call.
    x, z: (B, D) or (B, H, P), any of these dtypes and any strides, like all that follow. With one
        more axis T after B for several tokens; dt, B, C and y then have it too.
    dt: (B, D); or (B, H) or (B, H, P). Step size.
    A: (D, N); or (H,) or (H, P, N). Continuous decay.
    B, C: (B, N) or (B, G, N); G divides D or H.
    D, dt_bias: (D,); or (H,) or (H, P).
    state_indices: (B,) int32. The row of state that each batch row uses, none twice; -1 gives
        y = 0 and changes no state. Without it R is B.
    y: as x. Output; written completely.
    softplus: Apply softplus to dt + dt_bias.
    num_threads: 0 means the process-wide setting; not used on a GPU.
    stream: handle of the CUDA stream, 0 the legacy default stream; not used on the CPU.

Raises:
    ValueError: a shape, dtype, device or value breaks the contract; the message names the argument.
    TypeError: an argument is not an array with DLPack, or an output is read-only.
)");
}

}  // namespace ssm::bind
