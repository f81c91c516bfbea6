// The forward of the fused norm on the device: a row per warp or per several, kept in registers.
#include "kernels.h"
#include "numerics.cuh"
#include "rows.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "fused_layer_norm";

/// x and y are rows of X, the residual and the sum of S.
template <class Real, class X, class S>
struct Forward {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kBlocksPerUnit = kAnySize<X> ? 1 : 2;
    static constexpr int kWidth = X::kWidth, kPieces = kRowElements / kWidth;

    struct Registers {
        Real s[kRowElements];
        Real sum[1];
        Real mean;
    };

    RowCut cut;
    X x, y;
    S residual, residual_out;
    Plane<1> weight, bias;  // (D)
    Plane<1> mean, rstd;    // (M)
    Real eps;
    bool is_rms;

    std::int64_t shared_size() const { return 2 * kRowWarps; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const std::int64_t slabs = kAnySize<X> ? cut.slabs : 1;
        const auto row_of = [&](int thread) { return index * cut.slots + cut.slot(thread); };
        const auto part = [&](int thread, std::int64_t slab) {
            return cut.template part<kWidth>(row_of(thread), 0, slab, thread);
        };
        const auto sum = [](Registers& r) -> Real(&)[1] { return r.sum; };
        const Real share = Real(1) / static_cast<Real>(cut.size > 0 ? cut.size : 1);

        block.each([&](int, Registers& r) { r.sum[0] = 0; });
        for (std::int64_t slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, Registers& r) {
                load(part(thread, slab), r);
                SSM_UNROLL
                for (int e = 0; e < kRowElements; ++e)
                    r.sum[0] += is_rms ? r.s[e] * r.s[e] : r.s[e];
            });
        sum_groups<1>(block, 0, cut, sum);
        block.each([&](int, Registers& r) { r.mean = is_rms ? Real(0) : r.sum[0] * share; });
        if (!is_rms) {
            block.each([&](int, Registers& r) { r.sum[0] = 0; });
            for (std::int64_t slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, Registers& r) {
                    if (slabs > 1) load(part(thread, slab), r);
                    add_deviations(part(thread, slab), r);
                });
            sum_groups<1>(block, kRowWarps, cut, sum);
        }
        block.each([&](int thread, Registers& r) {
            r.sum[0] = rsqrt_of(r.sum[0] * share + eps);
            if (cut.lane(thread) != 0 || row_of(thread) >= cut.rows) return;
            if (mean) mean.store(row_of(thread) * mean.stride[0], r.mean);
            if (rstd) rstd.store(row_of(thread) * rstd.stride[0], r.sum[0]);
        });
        for (std::int64_t slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, Registers& r) {
                if (slabs > 1) load(part(thread, slab), r);
                store(part(thread, slab), r);
            });
    }

  private:
    /// s = x + residual.
    SSM_DEVICE void load(const RowPart& part, Registers& r) const {
        typename X::Piece xs[kPieces];
        load_part(x, part, xs);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e)
            r.s[e] = static_cast<Real>(widen(xs[e / kWidth].of[e % kWidth]));
        if (!residual) return;
        typename S::Piece residuals[kPieces];
        load_part(residual, part, residuals);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e)
            r.s[e] += static_cast<Real>(widen(residuals[e / kWidth].of[e % kWidth]));
    }

    SSM_DEVICE void add_deviations(const RowPart& part, Registers& r) const {
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) {
            const bool exists = e / kWidth * part.stride + e % kWidth < part.left;
            const Real deviation = exists ? r.s[e] - r.mean : Real(0);
            r.sum[0] += deviation * deviation;
        }
    }

    /// Writes the sum only now: it may lie where the residual does.
    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        if (residual_out) store_values(residual_out, part, r.s);
        const Real rstd = r.sum[0];
        SSM_UNROLL
        for (int k = 0; k < kPieces; ++k) {
            const auto w = vector_piece<Real, X>(weight, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                Real& s = r.s[k * kWidth + i];
                s = (s - r.mean) * rstd * w.of[i];
            }
            if (!bias) continue;
            const auto b = vector_piece<Real, X>(bias, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) r.s[k * kWidth + i] += b.of[i];
        }
        store_values(y, part, r.s);
    }
};

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& args, const Exec& exec) {
    const std::int64_t dim = args.x.shape[args.x.ndim - 1];
    const RowCut cut(row_count(args.x), dim, dim);
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        with_rows<Real, true>(cut, {&args.x, &args.y}, {&args.residual, &args.residual_out},
                              {&args.weight, &args.bias}, [&]<class X, class S>() {
                                  const Forward<Real, X, S> kernel{cut,
                                                                   X(args.x),
                                                                   X(args.y),
                                                                   S(args.residual),
                                                                   S(args.residual_out),
                                                                   plane<1>(args.weight),
                                                                   plane<1>(args.bias),
                                                                   plane<1>(args.mean),
                                                                   plane<1>(args.rstd),
                                                                   static_cast<Real>(args.eps),
                                                                   args.is_rms};
                                  launch<Real>(kOp, kernel, (cut.rows + cut.slots - 1) / cut.slots,
                                               args.x.device, exec);
                              });
    });
}

}  // namespace ssm::cuda
