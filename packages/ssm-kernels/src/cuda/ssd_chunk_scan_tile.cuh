// What the forward and the backward of the state-space dual scan share: how work is cut, how the
// sequences of a row are cut into pieces, and how a piece and its decays come into shared memory.
#pragma once

#include <ssm/ssd_chunk_scan.h>

#include "launch.cuh"
#include "numerics.cuh"
#include "sequences.cuh"
#include "tile_gemm.cuh"

namespace ssm::cuda {

constexpr const char* kSsdOp = "ssd_chunk_scan";
constexpr int kSsdTile = 64;      // steps of a tile
constexpr int kSsdChannels = 64;  // channels of a slab: a head has one slab or several
constexpr int kSsdThreads = 128;  // each warp owns 16 steps, or channels, of a tile

/// The tensors that both directions read, and the problem in plain numbers.
struct SsdInputs {
    Plane<4> X, z;            // (B, L, H, P)
    Plane<3> dt;              // (B, L, H)
    Plane<1> A, dt_bias;      // (H)
    Plane<4> B, C;            // (B, L, G, N)
    Plane<2> D;               // (H, P), or (H) with a stride of 0
    Plane<4> initial_states;  // (S, H, P, N)
    Plane<2> seq_idx;         // (B, L), int32
    std::int64_t batch, seqlen, heads, headdim, dstate, num_states;
    std::int64_t group_heads_B, group_heads_C;  // heads that share B, and C
    std::int64_t slabs;                         // along the channels of a head
    std::int64_t segments, segment_steps;       // the latter a multiple of kSsdTile
    double dt_low, dt_high;
    bool softplus, state_per_sequence;
    bool copies_X, copies_B, copies_C;  // lie in memory as matrices of the type of X do
};

inline SsdInputs ssd_inputs(const SsdChunkScanArgs& args, std::int64_t num_states) {
    SsdInputs in{};
    in.X = plane<4>(args.X), in.z = plane<4>(args.z), in.dt = plane<3>(args.dt);
    in.A = plane<1>(args.A), in.dt_bias = plane<1>(args.dt_bias);
    in.B = plane<4>(args.B), in.C = plane<4>(args.C), in.D = plane<2>(args.D);
    in.initial_states = plane<4>(args.initial_states), in.seq_idx = plane<2>(args.seq_idx);
    in.batch = args.X.shape[0], in.seqlen = args.X.shape[1], in.heads = args.X.shape[2];
    in.headdim = args.X.shape[3], in.dstate = args.B.shape[3], in.num_states = num_states;
    in.group_heads_B = in.heads / args.B.shape[2], in.group_heads_C = in.heads / args.C.shape[2];
    in.slabs = (in.headdim + kSsdChannels - 1) / kSsdChannels;
    in.dt_low = args.dt_low, in.dt_high = args.dt_high;
    in.softplus = args.softplus, in.state_per_sequence = args.state_per_sequence;
    const int width = args.X.dtype == DType::f64 ? 2 : args.X.dtype == DType::f32 ? 4 : 8;
    const auto copies = [&](const TensorView& view) {
        return view.dtype == args.X.dtype && in_packs(view, 3, width);
    };
    in.copies_X = copies(args.X), in.copies_B = copies(args.B), in.copies_C = copies(args.C);

    const Segments cut = cut_segments(in.seqlen, kSsdTile, in.batch * in.heads * in.slabs, 2);
    in.segments = cut.count, in.segment_steps = cut.steps;
    return in;
}

/// The part of the problem that one block works on. Neighbouring blocks are heads of one row, which
/// read the same B and C.
struct SsdPart {
    std::int64_t begin, end;  // steps
    int row, head, first_channel, segment;
    int channels;  // of this slab, the last one may have fewer
};

inline std::int64_t ssd_parts(const SsdInputs& in) {
    return in.batch * in.segments * in.heads * in.slabs;
}

SSM_DEVICE SsdPart ssd_part(const SsdInputs& in, std::int64_t index) {
    SsdPart part;
    const std::int64_t above = quotient(index, in.slabs);
    part.first_channel = static_cast<int>(index - above * in.slabs) * kSsdChannels;
    const std::int64_t rows = quotient(above, in.heads);
    part.head = static_cast<int>(above - rows * in.heads);
    const std::int64_t row = quotient(rows, in.segments);
    part.row = static_cast<int>(row);
    part.segment = static_cast<int>(rows - row * in.segments);
    part.begin = part.segment * in.segment_steps;
    const std::int64_t end = part.begin + in.segment_steps;
    part.end = end < in.seqlen ? end : in.seqlen;
    const std::int64_t left = in.headdim - part.first_channel;
    part.channels = static_cast<int>(left < kSsdChannels ? left : kSsdChannels);
    return part;
}

// Sequences -------------------------------------------------------------------------------------

SSM_DEVICE int lowest_bit(std::uint64_t bits) {
#if defined(__CUDACC__)
    return __ffsll(static_cast<long long>(bits)) - 1;
#else
    return __builtin_ctzll(bits);
#endif
}
SSM_DEVICE int highest_bit(std::uint64_t bits) {
#if defined(__CUDACC__)
    return 63 - __clzll(static_cast<long long>(bits));
#else
    return 63 - __builtin_clzll(bits);
#endif
}

/// Steps of one tile and one sequence, skipped ones among them: what is multiplied at once.
struct SsdPiece {
    std::int64_t begin;
    int steps;              // 0: no piece is left
    std::uint64_t skipped;  // bit s: the step begin + s is skipped
    bool starts;            // its first step begins a sequence, with the state of that or with zero
    std::int32_t before;    // the sequence of the last step before it that is not skipped, or -1
    std::int32_t sequence;  // the same at its end

    SSM_DEVICE bool has(int step) const { return step < steps && !(skipped >> step & 1); }
};

/// The steps of a tile that are skipped, and those that start a sequence, as bits.
struct SsdMarks {
    std::uint64_t skipped = 0, starts = 0;
};

/// The marks of the tile that begins at `begin`, behind steps of the sequence `before`, or -1.
template <class Block, class Inputs>
SSM_DEVICE SsdMarks ssd_marks(Block& block, const Inputs& in, std::int64_t row, std::int64_t begin,
                              std::int64_t end, std::int32_t before) {
    const auto is_start = [&](std::int64_t step) {
        const std::int32_t id = sequence_at(in, row, step);
        if (id < 0) return false;
        std::int32_t last = -1;
        while (step > begin && last < 0) last = sequence_at(in, row, --step);
        if (last < 0) last = before;
        // The first sequence of a row goes on from the state of the row.
        return id != last && (last >= 0 || in.state_per_sequence);
    };
    SsdMarks marks;
    for (int half = 0; half < kSsdTile; half += kWarp) {
        const std::uint64_t skipped = block.vote([&](int thread) {
            const std::int64_t step = begin + half + thread % kWarp;
            return step < end && sequence_at(in, row, step) < 0;
        });
        const std::uint64_t starts = block.vote([&](int thread) {
            const std::int64_t step = begin + half + thread % kWarp;
            return step < end && is_start(step);
        });
        marks.skipped |= skipped << half, marks.starts |= starts << half;
    }
    return marks;
}

/// Cuts the steps of a part into pieces: tiles, cut where sequences start.
class SsdPieces {
  public:
    SSM_DEVICE SsdPieces(const SsdInputs& in, int row, std::int64_t begin, std::int64_t end)
        : row_(row), step_(begin), end_(end), sequence_(sequence_before(in, row, begin)) {}

    /// The sequence of the last step so far that is not skipped, or -1.
    SSM_DEVICE std::int32_t sequence() const { return sequence_; }

    template <class Block>
    SSM_DEVICE SsdPiece next(Block& block, const SsdInputs& in) {
        const int offset = static_cast<int>(step_ % kSsdTile);
        if (in.seq_idx && offset == 0) marks_ = ssd_marks(block, in, row_, step_, end_, sequence_);
        SsdPiece piece;
        piece.begin = step_;
        piece.steps =
            static_cast<int>(end_ - step_ < kSsdTile - offset ? end_ - step_ : kSsdTile - offset);
        piece.skipped = marks_.skipped >> offset;
        piece.starts = marks_.starts >> offset & 1;
        piece.before = sequence_;
        if (const std::uint64_t later = marks_.starts >> offset >> 1;
            later != 0 && lowest_bit(later) + 1 < piece.steps)
            piece.steps = lowest_bit(later) + 1;
        if (piece.steps > 0) {
            const std::uint64_t all = ~std::uint64_t{0} >> (kSsdTile - piece.steps);
            if (const std::uint64_t valid = ~piece.skipped & all)
                sequence_ = sequence_at(in, row_, step_ + highest_bit(valid));
        }
        piece.sequence = sequence_;
        step_ += piece.steps;
        return piece;
    }

  private:
    int row_;
    std::int64_t step_, end_;
    SsdMarks marks_;  // of the tile of step_
    std::int32_t sequence_;
};

// Pieces in shared memory -----------------------------------------------------------------------

/// Begins to bring the steps of a piece and `columns` columns of a tensor (B, L, G, N) to a matrix
/// (step, column), from the element (0, 0, group, first) of the row on. What does not exist is
/// zero, and so are skipped steps.
template <class Element, int kColumns, int kThreads = kSsdThreads, class Block, class Stored>
SSM_DEVICE void fetch_rows(Block& block, int thread, const Stored& to, const Plane<4>& tensor,
                           bool copies, std::int64_t row, std::int64_t group, std::int64_t first,
                           std::int64_t columns, const SsdPiece& piece) {
    const std::int64_t base = row * tensor.stride[0] + piece.begin * tensor.stride[1] +
                              group * tensor.stride[2] + first * tensor.stride[3];
    if (copies) {
        constexpr int kWidth = 16 / sizeof(Element), kPerRow = kColumns / kWidth;
        constexpr int kRows = kThreads / kPerRow;
        const int first_step = thread / kPerRow, column = thread % kPerRow * kWidth;
        const Element* const none = static_cast<const Element*>(tensor.data);
        const Element* from = none + base + first_step * tensor.stride[1] + column;
        SSM_UNROLL_TWICE
        for (int step = first_step; step < kSsdTile; step += kRows) {
            const bool exists = piece.has(step) && column < columns;
            block.copy(to.at(step, column), exists ? from : none, exists);
            from += kRows * tensor.stride[1];
        }
        return;
    }
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* const from = static_cast<const Memory*>(tensor.data) + base;
        SSM_ROLLED
        for (int pair = thread; pair < kSsdTile * kColumns / 2; pair += kThreads) {
            const int step = pair / (kColumns / 2), column = pair % (kColumns / 2) * 2;
            const auto value = [&](int at) -> typename Block::RealType {
                return piece.has(step) && at < columns
                           ? widen(from[step * tensor.stride[1] + at * tensor.stride[3]])
                           : 0;
            };
            block.write_pair(to.at(step, column),
                             operand<Element>(value(column), value(column + 1)));
        }
    });
}

/// Places in shared memory of the decays of a piece, kSsdTile numbers each: the logarithm to base 2
/// of the decay from the begin of the piece to a step, as the sum of two numbers; the step size;
/// and the step size times the decay from the step to the end of the piece.
struct SsdDecays {
    static constexpr int kHigh = 0, kLow = kSsdTile, kStep = 2 * kSsdTile, kLeft = 3 * kSsdTile;
    static constexpr int kSize = 4 * kSsdTile;
};

/// The step size before its clamp, of the two steps 2 lane and 2 lane + 1 of a piece.
template <class Real>
SSM_DEVICE void fetch_steps(const SsdInputs& in, std::int64_t row, std::int64_t head,
                            const SsdPiece& piece, int lane, Real (&raw)[2]) {
    SSM_UNROLL
    for (int i = 0; i < 2; ++i) {
        const int step = 2 * lane + i;
        raw[i] = piece.has(step)
                     ? in.dt.template load<Real>(row * in.dt.stride[0] +
                                                 (piece.begin + step) * in.dt.stride[1] +
                                                 head * in.dt.stride[2])
                     : Real(0);
    }
}

/// clamp(softplus?(raw), low, high); NaN stays NaN.
template <class Inputs, class Real>
SSM_DEVICE Real step_size(const Inputs& in, Real raw) {
    Real size = in.softplus ? softplus(raw) : raw;
    const Real low = static_cast<Real>(in.dt_low), high = static_cast<Real>(in.dt_high);
    size = size < low ? low : size;
    return size > high ? high : size;
}

/// 2 to the difference of two logarithms that are sums of two numbers: the large parts cancel
/// exactly enough, whatever decays lie before both.
template <class Real>
SSM_DEVICE Real decay_between(Real high, Real low, Real from_high, Real from_low) {
    return exp2_of((high - from_high) + (low - from_low));
}

/// Writes the decays of a piece from a place on, by one warp. `raw(lane)` is Real[2], as
/// fetch_steps filled it.
template <class Real, class Block, class Raw>
SSM_DEVICE void write_decays(Block& block, Warp<Block>& warp, const SsdInputs& in,
                             std::int64_t head, const SsdPiece& piece, Raw&& raw, int place = 0) {
    struct Sums {
        Real size[2];
        // Logarithms: of the first step, of the lanes before, with this one, of the piece. None is
        // taken off again: a step that is no number would spoil the one before it.
        double first, before, upto, all;
    };
    PerLane<Sums> lanes;
    // Beyond this a decay is 0, or infinite: sums of infinities would be no numbers.
    constexpr Real kMost = 10000;
    const Real A = in.A.template load<Real>(head * in.A.stride[0]) * static_cast<Real>(kLog2e);
    const Real bias =
        in.dt_bias ? in.dt_bias.template load<Real>(head * in.dt_bias.stride[0]) : Real(0);
    warp.each([&](int lane, auto&) {
        Sums& sums = lanes(lane);
        Real power[2];
        SSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            sums.size[i] = piece.has(2 * lane + i) ? step_size(in, raw(lane)[i] + bias) : Real(0);
            power[i] = sums.size[i] == 0 ? Real(0) : sums.size[i] * A;
            power[i] = power[i] < -kMost ? -kMost : power[i];
            power[i] = power[i] > kMost ? kMost : power[i];
        }
        sums.first = power[0];
        sums.upto = static_cast<double>(power[0]) + power[1];
    });
    warp.prefix_sum([&](int lane) -> double& { return lanes(lane).upto; });
    warp.each([&](int lane, auto&) { lanes(lane).before = lanes(lane).all = lanes(lane).upto; });
    warp.shift([&](int lane) -> double& { return lanes(lane).before; });
    warp.broadcast(kWarp - 1, [&](int lane) -> double& { return lanes(lane).all; });
    warp.each([&](int lane, auto&) {
        const Sums& sums = lanes(lane);
        const Real end_high = static_cast<Real>(sums.all);
        const Real end_low = static_cast<Real>(sums.all - end_high);
        SSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            const double upto = i == 0 ? sums.before + sums.first : sums.upto;
            const Real high = static_cast<Real>(upto), low = static_cast<Real>(upto - high);
            const int step = place + 2 * lane + i;
            block.write(SsdDecays::kHigh + step, high);
            block.write(SsdDecays::kLow + step, low);
            block.write(SsdDecays::kStep + step, sums.size[i]);
            block.write(SsdDecays::kLeft + step,
                        sums.size[i] * decay_between(end_high, end_low, high, low));
        }
    });
}

// States ----------------------------------------------------------------------------------------

/// Calls use(n, i, exists, offset) for the accumulators [n][i] of a lane whose rows are the
/// channels of a slab and whose columns are states: whether there is such a channel and state, and
/// where it is in memory with these strides, from the first of the slab on.
template <int kStates, int kAtOnce = 4, class Use>
SSM_DEVICE void each_state(const SsdInputs& in, const SsdPart& part, int thread,
                           std::int64_t channel_stride, std::int64_t state_stride, Use&& use) {
    const int lane = thread % kWarp, channel = thread / kWarp % 4 * 16 + lane / 4;
    const int first = thread / kSsdThreads * kStates + lane % 4 * 2;
    const std::int64_t lower = 8 * channel_stride, next = 8 * state_stride;
    const bool here = channel < part.channels, below = channel + 8 < part.channels;
    int left = static_cast<int>(in.dstate) - first;
    std::int64_t offset = channel * channel_stride + first * state_stride;
    SSM_UNROLL
    for (int n = 0; n < kStates / 8; ++n) {
        use(n, 0, here && left > 0, offset);
        use(n, 1, here && left > 1, offset + state_stride);
        use(n, 2, below && left > 0, offset + lower);
        use(n, 3, below && left > 1, offset + lower + state_stride);
        offset += next, left -= 8;
        // More accesses at a time would not leave registers for anything else.
        if (n % kAtOnce == kAtOnce - 1) keep_order();
    }
}

/// Calls `use` with a null pointer of the type in memory, which may be known: then it is `Only`.
template <class Only, class Use>
SSM_DEVICE void visit_only(DType dtype, Use&& use) {
    if constexpr (std::is_void_v<Only>)
        visit(dtype, use);
    else
        use(static_cast<Only*>(nullptr));
}

/// State number `sequence` of (S, H, P, N) as the accumulators of a lane; 0 where there is none.
template <class Real, int kStates, int kAtOnce = 4, class Only = void>
SSM_DEVICE void take_state(const SsdInputs& in, const SsdPart& part, const Plane<4>& states,
                           std::int64_t sequence, int thread, Real (&h)[kStates / 8][4]) {
    SSM_UNROLL
    for (int i = 0; i < kStates / 2; ++i) h[i / 4][i % 4] = 0;
    if (!states) return;
    const std::int64_t base = sequence * states.stride[0] + part.head * states.stride[1] +
                              part.first_channel * states.stride[2];
    visit_only<Only>(states.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        const Memory* const from = static_cast<const Memory*>(states.data) + base;
        each_state<kStates, kAtOnce>(in, part, thread, states.stride[2], states.stride[3],
                                     [&](int n, int i, bool exists, std::int64_t offset) {
                                         if (exists)
                                             h[n][i] = static_cast<Real>(widen(from[offset]));
                                     });
    });
}

template <class Real, int kStates, int kAtOnce = 4, class Only = void>
SSM_DEVICE void put_state(const SsdInputs& in, const SsdPart& part, const Plane<4>& states,
                          std::int64_t sequence, int thread, const Real (&h)[kStates / 8][4]) {
    if (!states) return;
    const std::int64_t base = sequence * states.stride[0] + part.head * states.stride[1] +
                              part.first_channel * states.stride[2];
    visit_only<Only>(states.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        Memory* const to = static_cast<Memory*>(states.data) + base;
        each_state<kStates, kAtOnce>(in, part, thread, states.stride[2], states.stride[3],
                                     [&](int n, int i, bool exists, std::int64_t offset) {
                                         if (exists) narrow(h[n][i], to[offset]);
                                     });
    });
}

/// to = from, or 0: states (S, H, P, N) of sequences without steps.
template <class Real>
struct CopySsdStates {
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    Plane<4> from, to;
    std::int64_t heads, headdim, dstate, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t channel = element / dstate, head = channel / headdim;
            const std::int64_t at[4] = {head / heads, head % heads, channel % headdim,
                                        element % dstate};
            const auto offset = [&](const Plane<4>& tensor) {
                return at[0] * tensor.stride[0] + at[1] * tensor.stride[1] +
                       at[2] * tensor.stride[2] + at[3] * tensor.stride[3];
            };
            to.store(offset(to), from ? from.template load<Real>(offset(from)) : Real(0));
        });
    }
};

template <class Real>
void copy_ssd_states(const SsdInputs& in, const Plane<4>& from, const Plane<4>& to,
                     const Device& device, const Exec& exec) {
    const CopySsdStates<Real> kernel{from,      to,
                                     in.heads,  in.headdim,
                                     in.dstate, in.num_states * in.heads * in.headdim * in.dstate};
    launch<Real>(kSsdOp, kernel, (kernel.elements + kernel.kThreads - 1) / kernel.kThreads, device,
                 exec);
}

}  // namespace ssm::cuda
