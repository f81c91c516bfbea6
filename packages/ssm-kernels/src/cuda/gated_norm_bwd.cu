// The backward of the gated norm on the device: groups as in the forward, and the gradients of
// weight and bias summed over the rows of a block in registers, then over blocks in order.
#include "kernels.h"
#include "norms.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "gated_norm";
/// Elements of a pack of a 16-bit type: eight of them take too many registers.
constexpr int kHalfWidth = 4;

/// All tensors are rows of X. A block walks the rows of one chunk, in one group. kGateFirst: what
/// is normalised is s = x silu(z); else the gate comes last, if there is one.
template <class Real, class X, bool kGateFirst>
struct Backward {
    static constexpr int kThreads = kRowThreads;
    static constexpr int kBlocksPerUnit = 1;
    static constexpr int kWidth = X::kWidth, kPieces = kRowElements / kWidth;
    using Registers = NormGradRegisters<Real>;

    Norm<Real, true> norm;
    RowSums over;
    Partials<Real> partials;
    X x, z, dy, dx, dz;
    Plane<1> weight, bias;  // (D)

    std::int64_t shared_size() const {
        return norm.kBackwardShared + partials.shared_size(norm.cut);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        norm.template backward<X>(
            block, index, over, partials,
            [&](const RowPart& part, Registers& r, auto first) { enter(part, r, first); },
            [&](const RowPart& part, Registers& r) { store(part, r); });
    }

  private:
    SSM_DEVICE Real xhat_of(Real x, Real z, const Registers& r) const {
        return ((kGateFirst ? x * silu(z) : x) - r.mean) * r.rstd;
    }

    /// g, pack by pack: all of a row at once takes too many registers. The gradient of a gate that
    /// comes last as well.
    template <class First>
    SSM_DEVICE void enter(const RowPart& part, Registers& r, First) const {
        SSM_UNROLL
        for (int k = 0; k < kPieces; ++k) {
            if (k * part.stride >= part.left) continue;
            const typename X::Piece xs = load_piece(x, part, k), dys = load_piece(dy, part, k);
            typename X::Piece zs = {}, dzs;
            if (z) zs = load_piece(z, part, k);
            const auto w = vector_piece<Real, X>(weight, part, k);
            Pack<Real, kWidth> b = {};
            if (First::value && !kGateFirst && bias) b = vector_piece<Real, X>(bias, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                const int e = k * kWidth + i;
                const Real gate = widen(zs.of[i]), xhat = xhat_of(widen(xs.of[i]), gate, r);
                Real d = widen(dys.of[i]);
                if (!kGateFirst && z) {
                    const Real opening = sigmoid(gate);
                    narrow(d * (xhat * w.of[i] + b.of[i]) * silu_slope(gate, opening), dzs.of[i]);
                    d *= gate * opening;
                }
                r.g[e] = d * w.of[i];
                if (!First::value) continue;
                r.over_rows.add(e, d, xhat);
                r.add(e, xhat);
            }
            if (First::value && !kGateFirst && z) store_piece(dz, part, k, dzs);
        }
    }

    /// x and z are in the caches.
    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        SSM_UNROLL
        for (int k = 0; k < kPieces; ++k) {
            if (k * part.stride >= part.left) continue;
            const typename X::Piece xs = load_piece(x, part, k);
            typename X::Piece zs = {}, dxs, dzs;
            if (kGateFirst) zs = load_piece(z, part, k);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                const Real input = widen(xs.of[i]), gate = widen(zs.of[i]);
                const Real opening = kGateFirst ? sigmoid(gate) : Real(1);
                const Real s = kGateFirst ? input * (gate * opening) : input;
                const Real ds = r.gradient(k * kWidth + i, (s - r.mean) * r.rstd);
                if (kGateFirst) {
                    narrow(ds * input * silu_slope(gate, opening), dzs.of[i]);
                    narrow(ds * (gate * opening), dxs.of[i]);
                } else {
                    narrow(ds, dxs.of[i]);
                }
            }
            store_piece(dx, part, k, dxs);
            if (kGateFirst) store_piece(dz, part, k, dzs);
        }
    }
};

RowCut cut_of(const GatedNormArgs& args) {
    return RowCut(row_count(args.x), args.x.shape[args.x.ndim - 1], args.group_size);
}

}  // namespace

std::int64_t gated_norm_bwd_workspace(const GatedNormArgs& args) {
    return partials_size(cut_of(args), args.x.dtype);
}

void gated_norm_bwd(const GatedNormArgs& args, const GatedNormGrads& grads, const Exec& exec) {
    const RowCut cut = cut_of(args);
    const RowSums over(cut);
    const Device device = args.x.device;
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        const Norm<Real, true> norm{cut, plane<1>(args.mean), plane<1>(args.rstd), args.is_rms, 0};
        with_partials<Real>(kOp, cut, grads.dweight, grads.dbias, exec, device, [&](auto partials) {
            with_rows<Real, false, kHalfWidth>(
                cut, {&args.x, &args.z, &grads.dy, &grads.dx, &grads.dz}, {},
                {&args.weight, &args.bias}, [&]<class X, class>() {
                    const auto start = [&](auto gate_first) {
                        const Backward<Real, X, gate_first.value> kernel{norm,
                                                                         over,
                                                                         partials,
                                                                         X(args.x),
                                                                         X(args.z),
                                                                         X(grads.dy),
                                                                         X(grads.dx),
                                                                         X(grads.dz),
                                                                         plane<1>(args.weight),
                                                                         plane<1>(args.bias)};
                        launch<Real>(kOp, kernel, over.chunks * cut.groups, device, exec);
                    };
                    if (args.z.ndim != kAbsent && !args.norm_before_gate)
                        start(std::true_type());
                    else
                        start(std::false_type());
                });
        });
    });
}

}  // namespace ssm::cuda
