// The forward of the fused norm on the device: a row per warp or per several, kept in registers.
#include "kernels.h"
#include "norms.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "fused_layer_norm";

/// x and y are rows of X, the residual and the sum of S.
template <class Real, class X, class S>
struct Forward {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kWidth = X::kWidth, kPieces = kRowElements / kWidth;
    static constexpr int kBlocksPerUnit = kAnySize<X> || (kAfterHopper && kWidth == 4) ? 1 : 2;
    using Registers = NormRegisters<Real>;

    Norm<Real, false> norm;
    X x, y;
    S residual, residual_out;
    Plane<1> weight, bias;  // (D)

    std::int64_t shared_size() const { return norm.kForwardShared; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        norm.template forward<X>(
            block, index, [&](const RowPart& part, Registers& r) { load(part, r); },
            [&](const RowPart& part, Registers& r) { store(part, r); });
    }

  private:
    /// s = x + residual.
    SSM_DEVICE void load(const RowPart& part, Registers& r) const {
        typename X::Piece xs[kPieces];
        load_part(x, part, xs);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.s[e] = widen(xs[e / kWidth].of[e % kWidth]);
        if (!residual) return;
        typename S::Piece residuals[kPieces];
        load_part(residual, part, residuals);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e)
            r.s[e] += static_cast<Real>(widen(residuals[e / kWidth].of[e % kWidth]));
    }

    /// Writes the sum only now: it may lie where the residual does.
    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        if (residual_out) store_values(residual_out, part, r.s);
        scale_part<X>(r, weight, bias, part);
        store_values(y, part, r.s);
    }
};

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& args, const Exec& exec) {
    const std::int64_t dim = args.x.shape[args.x.ndim - 1];
    const RowCut cut(row_count(args.x), dim, dim);
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        const Norm<Real, false> norm{cut, plane<1>(args.mean), plane<1>(args.rstd), args.is_rms,
                                     static_cast<Real>(args.eps)};
        with_rows<Real, true, 8>(cut, {&args.x, &args.y}, {&args.residual, &args.residual_out},
                                 {&args.weight, &args.bias}, [&]<class X, class S>() {
                                     const Forward<Real, X, S> kernel{norm,
                                                                      X(args.x),
                                                                      X(args.y),
                                                                      S(args.residual),
                                                                      S(args.residual_out),
                                                                      plane<1>(args.weight),
                                                                      plane<1>(args.bias)};
                                     launch<Real>(kOp, kernel, norm.forward_blocks(), args.x.device,
                                                  exec);
                                 });
    });
}

}  // namespace ssm::cuda
