// A C++ program that runs the selective scan and checks it against the definition.
//
//   g++ -std=c++20 -fopenmp selective_scan.cpp -I<include> <lib>/libssm.a
#include <ssm/selective_scan.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

namespace {

constexpr int kBatch = 2, kDim = 24, kSeqlen = 50, kDstate = 16;

// A borrowed view of a dense row-major array: plain data, filled in by hand.
ssm::TensorView view(std::vector<float>& values, std::initializer_list<std::int64_t> shape) {
    ssm::TensorView tensor{.data = values.data(), .dtype = ssm::DType::f32, .ndim = 0};
    for (const std::int64_t size : shape) tensor.shape[tensor.ndim++] = size;
    std::int64_t stride = 1;
    for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
        tensor.stride[axis] = stride;
        stride *= tensor.shape[axis];
    }
    return tensor;
}

// Numbers without a pattern, between -1 and 1, the same in every run.
std::vector<float> numbers(std::size_t count) {
    static unsigned state = 1;
    std::vector<float> values(count);
    for (float& value : values) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return values;
}

}  // namespace

int main() {
    std::vector<float> u = numbers(kBatch * kDim * kSeqlen), delta = numbers(u.size());
    std::vector<float> A = numbers(kDim * kDstate);
    for (float& rate : A) rate = -std::exp(rate);
    std::vector<float> B = numbers(kBatch * kDstate * kSeqlen), C = numbers(B.size());
    std::vector<float> D = numbers(kDim), y(u.size());

    // Arguments have names; what is not given is absent.
    const ssm::SelectiveScanArgs args{
        .u = view(u, {kBatch, kDim, kSeqlen}),
        .delta = view(delta, {kBatch, kDim, kSeqlen}),
        .A = view(A, {kDim, kDstate}),
        .B = view(B, {kBatch, kDstate, kSeqlen}),
        .C = view(C, {kBatch, kDstate, kSeqlen}),
        .D = view(D, {kDim}),
        .y = view(y, {kBatch, kDim, kSeqlen}),
        .softplus = true,
    };
    try {
        ssm::selective_scan_fwd(args);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }

    double worst = 0.0;
    for (int b = 0; b < kBatch; ++b)
        for (int d = 0; d < kDim; ++d) {
            double h[kDstate] = {};
            for (int t = 0; t < kSeqlen; ++t) {
                const int at = (b * kDim + d) * kSeqlen + t;
                const double dt = std::log1p(std::exp(static_cast<double>(delta[at])));
                double want = static_cast<double>(D[d]) * u[at];
                for (int n = 0; n < kDstate; ++n) {
                    const int in = (b * kDstate + n) * kSeqlen + t;
                    h[n] = std::exp(dt * A[d * kDstate + n]) * h[n] + dt * B[in] * u[at];
                    want += C[in] * h[n];
                }
                worst = std::fmax(worst, std::fabs(want - y[at]) / (1.0 + std::fabs(want)));
            }
        }
    std::printf("ssm-kernels %s, %s: largest error %.1e\n", ssm::version(),
                ssm::isa_name(ssm::active_isa()), worst);
    return worst < 1e-5 ? 0 : 1;  // false for NaN as well
}
