// The backward of the fused norm on the device: rows as in the forward, and the gradients of weight
// and bias summed over the rows of a block in registers, then over blocks in order.
#include "kernels.h"
#include "rows.cuh"

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
    static constexpr bool kAtOnce = !kAnySize<X>;

    struct Registers {
        Real xhat[kRowElements], g[kRowElements];  // g = dy weight
        typename S::Piece ds[kPieces];
        VectorSums<Real> over_rows;
        Real sum[2];  // of g xhat and of g
        Real mean, rstd;
    };

    RowCut cut;
    RowSums over;
    X dy, dx;
    S x, residual, dresidual_out, dresidual;
    Plane<1> weight;      // (D)
    Plane<1> mean, rstd;  // (M)
    Partials<Real> partials;
    bool is_rms;

    std::int64_t shared_size() const { return 4 * kRowWarps + partials.shared_size(cut); }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t chunk) const {
        const std::int64_t slabs = kAnySize<X> ? cut.slabs : 1;
        block.each([&](int, Registers& r) { r.over_rows.clear(); });
        for (std::int64_t step = 0; step < over.steps; ++step) {
            const std::int64_t first = (chunk * over.steps + step) * cut.slots;
            const auto part = [&](int thread, std::int64_t slab) {
                return cut.template part<kWidth>(first + cut.slot(thread), 0, slab, thread);
            };
            block.each([&](int thread, Registers& r) { begin(first + cut.slot(thread), r); });
            for (std::int64_t slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, Registers& r) {
                    const RowPart at = part(thread, slab);
                    load(at, r);
                    if (slabs > 1) {
                        r.over_rows.clear();
                        if (step > 0) partials.template load<kWidth>(chunk, at, r.over_rows);
                    }
                    SSM_UNROLL
                    for (int e = 0; e < kRowElements; ++e) r.over_rows.add(e, r.g[e], r.xhat[e]);
                    if (slabs > 1) partials.template store<kWidth>(chunk, at, r.over_rows);
                    scale(at, r);
                    SSM_UNROLL
                    for (int e = 0; e < kRowElements; ++e) {
                        r.sum[0] += r.g[e] * r.xhat[e];
                        r.sum[1] += r.g[e];
                    }
                });
            sum_groups<2>(block, step % 2 * 2 * kRowWarps, cut,
                          [](Registers& r) -> Real(&)[2] { return r.sum; });
            for (std::int64_t slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, Registers& r) {
                    const RowPart at = part(thread, slab);
                    if (slabs > 1) {
                        load(at, r);
                        scale(at, r);
                    }
                    store(at, r);
                });
        }
        if (slabs == 1)
            partials.template leave<kWidth>(
                block, 4 * kRowWarps, cut, chunk, 0,
                [](Registers& r) -> VectorSums<Real>& { return r.over_rows; });
    }

  private:
    SSM_DEVICE void begin(std::int64_t row, Registers& r) const {
        const bool exists = row < cut.rows;
        r.mean = exists && !is_rms ? mean.template load<Real>(row * mean.stride[0]) : Real(0);
        r.rstd = exists ? rstd.template load<Real>(row * rstd.stride[0]) : Real(0);
        r.sum[0] = r.sum[1] = 0;
    }

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

    SSM_DEVICE void scale(const RowPart& part, Registers& r) const {
        SSM_UNROLL
        for (int k = 0; k < kPieces; ++k) {
            const auto w = vector_piece<Real, X>(weight, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) r.g[k * kWidth + i] *= w.of[i];
        }
    }

    /// ds = (g - mean(g) - xhat mean(g xhat)) rstd + dresidual_out.
    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        const Real share = Real(1) / static_cast<Real>(cut.size);
        const Real along = r.sum[0] * share, constant = is_rms ? Real(0) : r.sum[1] * share;
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e)
            r.g[e] = (r.g[e] - constant - r.xhat[e] * along) * r.rstd;
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
        with_partials<Real>(kOp, cut, grads.dweight, grads.dbias, exec, device, [&](auto partials) {
            with_rows<Real, true>(cut, {&grads.dy, &grads.dx},
                                  {&args.x, &args.residual, &grads.dresidual_out, &grads.dresidual},
                                  {&args.weight}, [&]<class X, class S>() {
                                      const Backward<Real, X, S> kernel{cut,
                                                                        over,
                                                                        X(grads.dy),
                                                                        X(grads.dx),
                                                                        S(args.x),
                                                                        S(args.residual),
                                                                        S(grads.dresidual_out),
                                                                        S(grads.dresidual),
                                                                        plane<1>(args.weight),
                                                                        plane<1>(args.mean),
                                                                        plane<1>(args.rstd),
                                                                        partials,
                                                                        args.is_rms};
                                      launch<Real>(kOp, kernel, over.chunks, device, exec);
                                  });
        });
    });
}

}  // namespace ssm::cuda
