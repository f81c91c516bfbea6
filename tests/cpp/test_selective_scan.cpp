// The C++ contract of the selective scan: it links, it refuses in words, it fills what it promises.
// Judge: the header. Numbers are the business of tests/kernels.
#include <ssm/selective_scan.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int failures = 0;

void check(bool good, const std::string& what) {
    if (good) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
}

struct Array {
    std::vector<float> values;
    ssm::TensorView view{};

    explicit Array(std::initializer_list<std::int64_t> shape, float fill) {
        std::int64_t count = 1;
        view.ndim = 0;
        for (const std::int64_t size : shape) {
            view.shape[view.ndim++] = size;
            count *= size;
        }
        for (std::int64_t axis = view.ndim - 1, stride = 1; axis >= 0; --axis) {
            view.stride[axis] = stride;
            stride *= view.shape[axis];
        }
        values.assign(static_cast<std::size_t>(count), fill);
        view.data = values.data();
    }
    bool finite() const {
        for (const float value : values)
            if (!std::isfinite(value)) return false;
        return true;
    }
    bool all(float wanted) const {
        for (const float value : values)
            if (value != wanted) return false;
        return true;
    }
};

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// Arguments of both directions that pass: B = 2, D = 4, N = 3.
struct Problem {
    Array u, delta, A, B, C, D, z, bias, initial, y, last, checkpoints;
    Array dy, dlast, du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial;

    explicit Problem(std::int64_t L = 40)
        : u({2, 4, L}, 0.5f),
          delta({2, 4, L}, 0.1f),
          A({4, 3}, -1.0f),
          B({2, 3, L}, 1.0f),
          C({2, 1, 3, L}, 1.0f),
          D({4}, 1.0f),
          z({2, 4, L}, 1.0f),
          bias({4}, 0.0f),
          initial({2, 4, 3}, 2.0f),
          y({2, 4, L}, kPoison),
          last({2, 4, 3}, kPoison),
          checkpoints({2, (L + 31) / 32, 3, 4}, kPoison),
          dy({2, 4, L}, 1.0f),
          dlast({2, 4, 3}, 3.0f),
          du({2, 4, L}, kPoison),
          ddelta({2, 4, L}, kPoison),
          dA({4, 3}, kPoison),
          dB({2, 3, L}, kPoison),
          dC({2, 1, 3, L}, kPoison),
          dD({4}, kPoison),
          dz({2, 4, L}, kPoison),
          dbias({4}, kPoison),
          dinitial({2, 4, 3}, kPoison) {}

    ssm::SelectiveScanArgs args() const {
        return {.u = u.view,
                .delta = delta.view,
                .A = A.view,
                .B = B.view,
                .C = C.view,
                .D = D.view,
                .z = z.view,
                .dt_bias = bias.view,
                .initial_state = initial.view,
                .y = y.view,
                .last_state = last.view,
                .checkpoints = checkpoints.view,
                .softplus = true};
    }
    ssm::SelectiveScanGrads grads() const {
        return {.dy = dy.view,
                .dlast_state = dlast.view,
                .du = du.view,
                .ddelta = ddelta.view,
                .dA = dA.view,
                .dB = dB.view,
                .dC = dC.view,
                .dD = dD.view,
                .dz = dz.view,
                .ddt_bias = dbias.view,
                .dinitial_state = dinitial.view};
    }
    bool forward_finite() const { return y.finite() && last.finite() && checkpoints.finite(); }
    bool backward_finite() const {
        for (const Array* array : {&du, &ddelta, &dA, &dB, &dC, &dD, &dz, &dbias, &dinitial})
            if (!array->finite()) return false;
        return true;
    }
};

void fills_outputs() {
    const Problem problem;
    ssm::selective_scan_fwd(problem.args());
    check(problem.forward_finite(), "the forward fills y, last_state and checkpoints");
    ssm::selective_scan_bwd(problem.args(), problem.grads());
    check(problem.backward_finite(), "the backward fills every gradient");

    const Problem threaded;
    ssm::selective_scan_fwd(threaded.args(), {.num_threads = 3});
    check(threaded.y.values == problem.y.values, "the thread count changes nothing");
}

void leaves_out_what_is_absent() {
    const Problem problem;
    ssm::selective_scan_fwd({.u = problem.u.view,
                             .delta = problem.delta.view,
                             .A = problem.A.view,
                             .B = problem.B.view,
                             .C = problem.C.view,
                             .y = problem.y.view});
    check(problem.y.finite(), "only y is filled when nothing else is given");
    check(std::isnan(problem.last.values[0]), "an absent last_state is not written");
}

void accepts_nothing_to_do() {
    const Problem problem(0);
    ssm::selective_scan_fwd(problem.args());
    check(problem.last.all(2.0f), "L = 0 hands the initial state on");
    ssm::selective_scan_bwd(problem.args(), problem.grads());
    check(problem.dinitial.all(3.0f), "L = 0 hands the gradient of the state on");
    check(problem.dA.all(0.0f) && problem.dD.all(0.0f), "L = 0 gives zero gradients");
}

void skips_steps() {
    const Problem problem;
    std::vector<std::int32_t> ids(80, -1);
    ssm::SelectiveScanArgs args = problem.args();
    args.seq_idx = {.data = ids.data(),
                    .dtype = ssm::DType::i32,
                    .ndim = 2,
                    .shape = {2, 40},
                    .stride = {40, 1}};
    ssm::selective_scan_fwd(args);
    check(problem.y.all(0.0f), "a skipped step gives 0");
    check(problem.last.all(2.0f), "skipped steps leave the state");
}

void refuses(const std::string& sentence,
             const std::function<void(ssm::SelectiveScanArgs&, ssm::SelectiveScanGrads&)>& spoil,
             bool backward = false) {
    const Problem problem;
    ssm::SelectiveScanArgs args = problem.args();
    ssm::SelectiveScanGrads grads = problem.grads();
    spoil(args, grads);
    std::string found = "nothing was thrown";
    try {
        if (backward)
            ssm::selective_scan_bwd(args, grads);
        else
            ssm::selective_scan_fwd(args);
    } catch (const std::invalid_argument& error) {
        found = error.what();
    }
    check(found == "selective_scan: " + sentence, "wanted: " + sentence + "\n  found: " + found);
    check(std::isnan(problem.y.values[0]) && std::isnan(problem.du.values[0]),
          "a refusal writes nothing: " + sentence);
}

void refuses_bad_input() {
    using Args = ssm::SelectiveScanArgs;
    using Grads = ssm::SelectiveScanGrads;
    refuses("u must be given, got None", [](Args& a, Grads&) { a.u = {}; });
    refuses("u must have shape (B, D, L), got (2, 4)", [](Args& a, Grads&) { a.u.ndim = 2; });
    refuses("delta must have shape (B, D, L) = (2, 4, 40), got (2, 3, 40)",
            [](Args& a, Grads&) { a.delta.shape[1] = 3; });
    refuses("A must have dtype float64, float32, bfloat16 or float16, got int32",
            [](Args& a, Grads&) { a.A.dtype = ssm::DType::i32; });
    refuses("C must have a group count that divides D = 4, got 3",
            [](Args& a, Grads&) { a.C.shape[1] = 3; });
    refuses("D must have storage, got a null data pointer",
            [](Args& a, Grads&) { a.D.data = nullptr; });
    refuses("z must be on cpu, got cuda:1",
            [](Args& a, Grads&) { a.z.device = {ssm::DeviceType::cuda, 1}; });
    refuses("y must not overlap itself, got stride 0 along axis 1",
            [](Args& a, Grads&) { a.y.stride[1] = 0; });
    refuses("checkpoints must be contiguous, got stride 12 along axis 3",
            [](Args& a, Grads&) { a.checkpoints.stride[3] = 12; });
    refuses(
        "checkpoints must be given, got None", [](Args& a, Grads&) { a.checkpoints = {}; }, true);
    refuses("dy must be given, got None", [](Args&, Grads& g) { g.dy = {}; }, true);
    refuses("dD must be given, got None", [](Args&, Grads& g) { g.dD = {}; }, true);
    refuses(
        "dA must have shape (D, N) = (4, 3), got (4, 2)",
        [](Args&, Grads& g) { g.dA.shape[1] = 2; }, true);
}

void refuses_other_devices() {
    Problem problem;
    ssm::SelectiveScanArgs args = problem.args();
    args.u.device = {ssm::DeviceType::cuda, 0};
    try {
        ssm::selective_scan_fwd(args);
        check(false, "tensors on a GPU are refused while nothing serves them");
    } catch (const std::runtime_error& error) {
        check(std::strcmp(
                  error.what(),
                  "selective_scan: tensors must be on the cpu while the extension module _cuda of "
                  "ssm-kernels is not loaded, got cuda:0") == 0,
              error.what());
    }
}

void process_wide_choices() {
    check(ssm::isa_available(ssm::active_isa()), "the active instruction set is available");
    check(ssm::isa_available(ssm::Isa::baseline), "baseline is always available");
    ssm::set_num_threads(2);
    check(ssm::num_threads() == 2, "set_num_threads is heard");
    try {
        ssm::set_num_threads(0);
        check(false, "set_num_threads refuses 0");
    } catch (const std::invalid_argument& error) {
        check(std::strcmp(error.what(), "set_num_threads: count must be at least 1, got 0") == 0,
              error.what());
    }
}

}  // namespace

int main() {
    process_wide_choices();
    fills_outputs();
    leaves_out_what_is_absent();
    accepts_nothing_to_do();
    skips_steps();
    refuses_bad_input();
    refuses_other_devices();
    if (failures == 0) std::printf("selective_scan: the C++ contract holds\n");
    return failures == 0 ? 0 : 1;
}
