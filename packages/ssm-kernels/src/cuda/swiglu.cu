// The SwiGLU activation on the device: a stream of elements, moved 16 bytes at a time where types,
// layouts and addresses allow it.
#include "element.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "numerics.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "swiglu";
constexpr int kBlock = 256;

template <class Real>
SSM_DEVICE void differentiate(Real gate, Real up, Real dy, Real& dgate, Real& dup) {
    const Real opening = sigmoid(gate);
    dup = dy * (gate * opening);
    dgate = dy * up * silu_slope(gate, opening);
}

/// One pack per thread.
template <class Memory, class Real>
struct Packed {
    static constexpr int kThreads = kBlock;
    static constexpr int kBlocksPerUnit = 1;
    static constexpr int kWidth = Pack<Memory>::kWidth;
    struct Registers {};

    PackedRows<Memory> gate, up, dy, y, dgate, dup;  // without y: the backward
    std::int64_t packs, row_packs;                   // in all, and of one row

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t pack = index * kThreads + thread;
            if (pack >= packs) return;
            const std::int64_t row = quotient(pack, row_packs);
            const std::int64_t column = (pack - row * row_packs) * kWidth;
            const Pack<Memory> gates = gate.load(row, column), ups = up.load(row, column);
            Pack<Memory> first, second;
            if (y) {
                SSM_UNROLL
                for (int i = 0; i < kWidth; ++i)
                    narrow(silu(static_cast<Real>(widen(gates.of[i]))) *
                               static_cast<Real>(widen(ups.of[i])),
                           first.of[i]);
                y.store(row, column, first);
                return;
            }
            const Pack<Memory> dys = dy.load(row, column);
            SSM_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                Real dg, du;
                differentiate<Real>(widen(gates.of[i]), widen(ups.of[i]), widen(dys.of[i]), dg, du);
                narrow(dg, first.of[i]);
                narrow(du, second.of[i]);
            }
            dgate.store(row, column, first);
            dup.store(row, column, second);
        });
    }
};

/// Any types and strides: one element per thread.
template <class Real>
struct Strided {
    static constexpr int kThreads = kBlock;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    Rows gate, up, dy, y, dgate, dup;  // without y: the backward
    std::int64_t columns, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t row = element / columns, column = element - row * columns;
            const auto load = [&](const Rows& tensor) {
                return tensor.template load<Real>(tensor.row_offset(row), column);
            };
            const auto store = [&](const Rows& tensor, Real value) {
                tensor.store(tensor.row_offset(row), column, value);
            };
            const Real g = load(gate), u = load(up);
            if (y) return store(y, silu(g) * u);
            Real dg, du;
            differentiate<Real>(g, u, load(dy), dg, du);
            store(dgate, dg);
            store(dup, du);
        });
    }
};

template <class Real, class Memory>
void start_packed(const SwigluArgs& args, const SwigluGrads& grads, const Exec& exec) {
    const std::int64_t row_packs = args.gate.shape[1] / Pack<Memory>::kWidth;
    const Packed<Memory, Real> kernel{
        PackedRows<Memory>(args.gate),   PackedRows<Memory>(args.up),
        PackedRows<Memory>(grads.dy),    PackedRows<Memory>(args.y),
        PackedRows<Memory>(grads.dgate), PackedRows<Memory>(grads.dup),
        args.gate.shape[0] * row_packs,  row_packs};
    launch<Real>(kOp, kernel, (kernel.packs + kBlock - 1) / kBlock, args.gate.device, exec);
}

template <class Real>
void start_strided(const SwigluArgs& args, const SwigluGrads& grads, const Exec& exec) {
    const std::int64_t columns = args.gate.shape[args.gate.ndim - 1];
    const Strided<Real> kernel{
        Rows(args.gate),   Rows(args.up),   Rows(grads.dy), Rows(args.y),
        Rows(grads.dgate), Rows(grads.dup), columns,        row_count(args.gate) * columns};
    launch<Real>(kOp, kernel, (kernel.elements + kBlock - 1) / kBlock, args.gate.device, exec);
}

void start(const SwigluArgs& args, const SwigluGrads& grads, const Exec& exec) {
    const DType dtype = args.gate.dtype;
    bool packed = true;
    for (const TensorView* view :
         {&args.gate, &args.up, &args.y, &grads.dy, &grads.dgate, &grads.dup})
        packed = packed && is_packed(*view, dtype);
    with_compute_type(dtype, [&](auto zero) {
        using Real = decltype(zero);
        if (!packed) return start_strided<Real>(args, grads, exec);
        with_memory_type(
            dtype, [&](auto element) { start_packed<Real, decltype(element)>(args, grads, exec); });
    });
}

}  // namespace

void swiglu_fwd(const SwigluArgs& args, const Exec& exec) { start(args, {}, exec); }

void swiglu_bwd(const SwigluArgs& args, const SwigluGrads& grads, const Exec& exec) {
    SwigluArgs inputs = args;
    inputs.y = {};
    start(inputs, grads, exec);
}

}  // namespace ssm::cuda
