// The backward of the fused norm on the device: rows as in the forward, and the gradients of weight
// and bias summed over the rows of a block in registers, then over blocks in order.
#include "kernels.h"
#include "norms.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "fused_layer_norm";

/// dy and dx are rows of X, all others of S. A block walks the rows of one chunk.
template <class Real, class X, class S>
struct Backward {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kBlocksPerUnit = 1;
    static constexpr int kWidth = X::kWidth, kPieces = kRowElements / kWidth;
    /// All of a row is fetched at once; rows of any layout lack the registers.
    static constexpr bool kAtOnce = !kAnySize<X> && !kAfterHopper;

    struct Registers : NormGradRegisters<Real> {
        Real xhat[kRowElements];
        typename S::Piece ds[kPieces];
    };

    Norm<Real, false> norm;
    RowSums over;
    Partials<Real> partials;
    X dy, dx;
    S x, residual, dresidual_out, dresidual;
    Plane<1> weight;  // (D)

    std::int64_t shared_size() const {
        return norm.kBackwardShared + partials.shared_size(norm.cut);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        norm.template backward<X>(
            block, index, over, partials,
            [&](const RowPart& part, Registers& r, auto first) {
                load(part, r);
                scale(part, r, first);
            },
            [&](const RowPart& part, Registers& r) { store(part, r); });
    }

  private:
    /// xhat, and dy in the place of g.
    SSM_DEVICE void load(const RowPart& part, Registers& r) const {
        typename S::Piece xs[kPieces];
        typename X::Piece dys[kPieces];
        load_part(x, part, xs);
        if (kAtOnce) load_part(dy, part, dys);
        if (kAtOnce && dresidual_out) load_part(dresidual_out, part, r.ds);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.xhat[e] = widen(xs[e / kWidth].of[e % kWidth]);
        if (residual) {
            load_part(residual, part, xs);
            SSM_UNROLL
            for (int e = 0; e < kRowElements; ++e)
                r.xhat[e] += static_cast<Real>(widen(xs[e / kWidth].of[e % kWidth]));
        }
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.xhat[e] = (r.xhat[e] - r.mean) * r.rstd;
        if (!kAtOnce) load_part(dy, part, dys);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.g[e] = widen(dys[e / kWidth].of[e % kWidth]);
    }

    template <class First>
    SSM_DEVICE void scale(const RowPart& part, Registers& r, First) const {
        SSM_UNROLL
        for (int k = 0; k < kPieces; ++k) {
            const auto w = vector_piece<Real, X>(weight, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                const int e = k * kWidth + i;
                if (First::value) r.over_rows.add(e, r.g[e], r.xhat[e]);
                r.g[e] *= w.of[i];
                if (First::value) r.add(e, r.xhat[e]);
            }
        }
    }

    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.g[e] = r.gradient(e, r.xhat[e]);
        if (dresidual_out) {
            if (!kAtOnce) load_part(dresidual_out, part, r.ds);
            SSM_UNROLL
            for (int e = 0; e < kRowElements; ++e)
                r.g[e] += static_cast<Real>(widen(r.ds[e / kWidth].of[e % kWidth]));
        }
        store_values(dx, part, r.g);
        if (dresidual) store_values(dresidual, part, r.g);
    }
};

RowCut cut_of(const FusedLayerNormArgs& args) {
    const std::int64_t dim = args.x.shape[args.x.ndim - 1];
    return RowCut(row_count(args.x), dim, dim);
}

}  // namespace

std::int64_t fused_layer_norm_bwd_workspace(const FusedLayerNormArgs& args) {
    return partials_size(cut_of(args), args.x.dtype);
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                          const Exec& exec) {
    const RowCut cut = cut_of(args);
    const RowSums over(cut);
    const Device device = args.x.device;
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        const Norm<Real, false> norm{cut, plane<1>(args.mean), plane<1>(args.rstd), args.is_rms, 0};
        with_partials<Real>(kOp, cut, grads.dweight, grads.dbias, exec, device, [&](auto partials) {
            with_rows<Real, true, 8>(
                cut, {&grads.dy, &grads.dx},
                {&args.x, &args.residual, &grads.dresidual_out, &grads.dresidual}, {&args.weight},
                [&]<class X, class S>() {
                    const Backward<Real, X, S> kernel{norm,
                                                      over,
                                                      partials,
                                                      X(grads.dy),
                                                      X(grads.dx),
                                                      S(args.x),
                                                      S(args.residual),
                                                      S(grads.dresidual_out),
                                                      S(grads.dresidual),
                                                      plane<1>(args.weight)};
                    launch<Real>(kOp, kernel, over.chunks, device, exec);
                });
        });
    });
}

}  // namespace ssm::cuda
