// The forward of the gated norm on the device: a group of a row per warp or per several, kept in
// registers.
#include "kernels.h"
#include "norms.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "gated_norm";

/// x, z and y are rows of X.
template <class Real, class X>
struct Forward {
    static constexpr int kThreads = kRowThreads;
    /// Elements of four bytes take twice the registers, and half the threads fetch as much.
    static constexpr int kBlocksPerUnit =
        sizeof(X::Piece::of) / X::kWidth == 2 && !kAfterHopper ? 2 : 1;
    static constexpr int kWidth = X::kWidth, kPieces = kRowElements / kWidth;
    /// A gate that comes last is fetched with x; rows of any layout lack the registers.
    static constexpr bool kAtOnce = !kAnySize<X>;

    struct Registers : NormRegisters<Real> {
        typename X::Piece z[kPieces];
    };

    Norm<Real, true> norm;
    X x, z, y;
    Plane<1> weight, bias;  // (D)
    bool gate_first;

    std::int64_t shared_size() const { return norm.kForwardShared; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        norm.template forward<X>(
            block, index, [&](const RowPart& part, Registers& r) { load(part, r); },
            [&](const RowPart& part, Registers& r) { store(part, r); });
    }

  private:
    SSM_DEVICE void load(const RowPart& part, Registers& r) const {
        typename X::Piece xs[kPieces];
        load_part(x, part, xs);
        if (z && (kAtOnce || gate_first)) load_part(z, part, r.z);
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) r.s[e] = widen(xs[e / kWidth].of[e % kWidth]);
        if (gate_first) gate(r);
    }

    SSM_DEVICE void store(const RowPart& part, Registers& r) const {
        scale_part<X>(r, weight, bias, part);
        if (z && !gate_first) {
            if (!kAtOnce) load_part(z, part, r.z);
            gate(r);
        }
        store_values(y, part, r.s);
    }

    SSM_DEVICE void gate(Registers& r) const {
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e)
            r.s[e] *= silu(static_cast<Real>(widen(r.z[e / kWidth].of[e % kWidth])));
    }
};

}  // namespace

void gated_norm_fwd(const GatedNormArgs& args, const Exec& exec) {
    const RowCut cut(row_count(args.x), args.x.shape[args.x.ndim - 1], args.group_size);
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        const Norm<Real, true> norm{cut, plane<1>(args.mean), plane<1>(args.rstd), args.is_rms,
                                    static_cast<Real>(args.eps)};
        with_rows<Real, false, 8>(
            cut, {&args.x, &args.z, &args.y}, {}, {&args.weight, &args.bias},
            [&]<class X, class>() {
                const Forward<Real, X> kernel{norm,
                                              X(args.x),
                                              X(args.z),
                                              X(args.y),
                                              plane<1>(args.weight),
                                              plane<1>(args.bias),
                                              args.z.ndim != kAbsent && !args.norm_before_gate};
                launch<Real>(kOp, kernel, norm.forward_blocks(), args.x.device, exec);
            });
    });
}

}  // namespace ssm::cuda
