// What the selective scan's forward and backward share: the cut of the work and the tile in cache.
#pragma once

#include <ssm/selective_scan.h>

#include <cstddef>
#include <initializer_list>

#include "sequences.h"
#include "vmath.h"

namespace ssm::cpu::SSM_ISA {

constexpr std::int64_t kScanSteps = kSelectiveScanCheckpoint;
constexpr std::int64_t kScanChannels = 32;  // two AVX-512 vectors: one B and C tile serves both

/// Some channels of one row that share their B and C.
struct ScanBlock {
    std::int64_t row;
    std::int64_t channel;
    std::int64_t width;
    std::int64_t padded_width;  // width rounded up to whole vectors
};

/// Sizes of one call and its cut into blocks, which depends on nothing but these sizes.
struct ScanShape {
    std::int64_t batch, dim, seqlen, dstate;
    std::int64_t groups;  // runs of channels that share both B and C
    std::int64_t blocks_per_group;

    explicit ScanShape(const SelectiveScanArgs& args)
        : batch(args.u.shape[0]),
          dim(args.u.shape[1]),
          seqlen(args.u.shape[2]),
          dstate(args.A.shape[1]) {
        // B and C may have different group counts: the least common multiple cuts at both.
        groups = least_common_multiple(groups_of(args.B), groups_of(args.C));
        blocks_per_group = (dim / groups + kScanChannels - 1) / kScanChannels;
    }

    static std::int64_t groups_of(const TensorView& view) {
        return view.ndim == 2 ? 1 : view.shape[1];
    }
    static constexpr std::int64_t kMostBlocks = 4;
    /// Blocks of the forward's tasks: neighbours in memory, but two tasks per thread if there are
    /// as many. No sum crosses a block, so that the cut changes no result.
    std::int64_t blocks_per_task(int threads) const {
        const std::int64_t wanted = batch * blocks_per_row() / (2 * threads);
        return max(1, min(min(wanted, kMostBlocks), blocks_per_group));
    }
    std::int64_t blocks_per_row() const { return groups * blocks_per_group; }

    /// Block `index` of a row, groups in order.
    ScanBlock block(std::int64_t row, std::int64_t index, std::int64_t lanes) const {
        const std::int64_t offset = index % blocks_per_group * kScanChannels;
        const std::int64_t width = min(kScanChannels, dim / groups - offset);
        return {row, index / blocks_per_group * (dim / groups) + offset, width,
                (width + lanes - 1) / lanes * lanes};
    }
};

/// (B, D, L) from step t0 on: rows are steps, columns are channels.
SSM_INLINE Plane sequence_plane(const TensorView& view, const ScanBlock& block, std::int64_t t0) {
    return plane_at(
        view, block.row * view.stride[0] + block.channel * view.stride[1] + t0 * view.stride[2],
        view.stride[2], view.stride[1]);
}

/// (D, N), or (S, D, N) at one sequence: rows are states, columns are channels.
SSM_INLINE Plane channel_state_plane(const TensorView& view, std::int64_t sequence,
                                     std::int64_t channel) {
    const int axis = view.ndim - 2;
    const std::int64_t base = view.ndim == 3 ? sequence * view.stride[0] : 0;
    return plane_at(view, base + channel * view.stride[axis], view.stride[axis + 1],
                    view.stride[axis]);
}

/// (B, chunks, N, D) at the chunk of step t0: rows are states, columns are channels.
SSM_INLINE Plane checkpoint_plane(const TensorView& view, const ScanBlock& block, std::int64_t t0) {
    return plane_at(view,
                    block.row * view.stride[0] + t0 / kScanSteps * view.stride[1] +
                        block.channel * view.stride[3],
                    view.stride[2], view.stride[3]);
}

/// What is read and written of the tile that is computed next, asked for while this one is, a few
/// lines per step. Not earlier: where rows lie a power of two apart, their lines share few places
/// of the cache, and those of several tiles would push each other out.
struct NextTile {
    Stripes planes[8];
    int count = 0;

    /// The steps from t0 on of what is given; nothing if that is outside of the sequence.
    NextTile(std::initializer_list<const TensorView*> views, const TensorView& checkpoints,
             const ScanShape& shape, const ScanBlock& block, std::int64_t t0) {
        const std::int64_t steps = min(kScanSteps, shape.seqlen - t0);
        if (t0 < 0 || steps <= 0) return;
        for (const TensorView* view : views)
            if (view->ndim >= 0)
                planes[count++] = {sequence_plane(*view, block, t0), steps, block.width};
        if (checkpoints.ndim >= 0)
            planes[count++] = {checkpoint_plane(checkpoints, block, t0), shape.dstate, block.width};
    }

    SSM_INLINE void request(const NextTile& next, int plane, std::int64_t line) {
        if (plane < next.count) request_stripe(next.planes[plane], line);
    }
};

/// (B, G, N, L) from step t0 on, for the group of a channel: rows are steps, columns are states.
SSM_INLINE Plane group_plane(const TensorView& view, const ScanShape& shape, const ScanBlock& block,
                             std::int64_t t0) {
    const std::int64_t group = block.channel / (shape.dim / view.shape[1]);
    return plane_at(view, block.row * view.stride[0] + group * view.stride[1] + t0 * view.stride[3],
                    view.stride[3], view.stride[2]);
}

/// (D): one row of channels.
SSM_INLINE Plane channel_plane(const TensorView& view, std::int64_t channel) {
    return plane_at(view, channel * view.stride[0], 0, view.stride[0]);
}

/// B or C of one step and state for all lanes: per channel when constant over time, else shared.
template <bool kConst, class T>
SSM_INLINE Vec<T> input_vector(const T* tile, std::int64_t dstate, std::int64_t t, std::int64_t n,
                               std::int64_t lane) {
    if constexpr (kConst)
        return load<T>(tile + n * kScanChannels + lane);
    else
        return broadcast(tile[t * dstate + n]);
}

/// choose<is B constant over time, is C>() for the B and C of a call.
template <class Choose>
auto by_inputs(const SelectiveScanArgs& args, const Choose& choose) {
    return args.B.ndim == 2 ? (args.C.ndim == 2 ? choose.template operator()<true, true>()
                                                : choose.template operator()<true, false>())
                            : (args.C.ndim == 2 ? choose.template operator()<false, true>()
                                                : choose.template operator()<false, false>());
}

/// Decays of one step, in place of their exponents. kInRange: load_inputs said so.
template <class T, bool kInRange, int kCount>
SSM_INLINE void decay(Vec<T>* exponents) {
    if constexpr (kInRange)
        exp2_bounded<kCount>(exponents);
    else
        exp2<kCount>(exponents);
}

/// What a tile keeps beside the scan itself: the backward needs all inputs again, the forward lets
/// an array serve twice, so that the whole tile stays in the first-level cache.
enum class Keep { outputs, inputs };

/// Dense arrays for 32 steps of 32 channels in the compute type. Channels beyond the block's width
/// are zero on input and never stored.
template <class T>
struct ScanTile {
    // The padding keeps equal places of two areas from being equal modulo 4096 bytes, where a load
    // waits for an earlier store of another area and all areas fight for the same cache sets.
    static constexpr std::int64_t kArea = kScanSteps * kScanChannels + 160;

    T* dt;     // [step][channel]   after softplus
    T* dtu;    // [step][channel]   dt * u
    T* y;      // [step][channel]
    T* u;      // [step][channel]   shares y when inputs are not kept
    T* raw;    // [step][channel]   delta + dt_bias; shares dt
    T* z;      // [step][channel]   shares dtu: read only after the scan
    T* A;      // [state][channel]  times log2(e), for exp2
    T* h;      // [state][channel]
    T* B;      // [step][state], or [state][channel] when constant
    T* C;      // as B
    T* D;      // [channel]
    T* bias;   // [channel]
    T* limit;  // [channel]         largest |dt|
    T* begin;
    T* end;

    static std::int64_t elements(std::int64_t dstate, Keep keep) {
        return (keep == Keep::inputs ? 6 : 3) * kArea + (4 * dstate + 3) * kScanChannels;
    }

    ScanTile() = default;
    ScanTile(T* memory, std::int64_t dstate, Keep keep) : begin(memory) {
        const auto take = [&memory](std::int64_t count) {
            T* const area = memory;
            memory += count;
            return area;
        };
        const bool apart = keep == Keep::inputs;
        dt = take(kArea);
        dtu = take(kArea);
        y = take(kArea);
        u = apart ? take(kArea) : y;
        raw = apart ? take(kArea) : dt;
        z = apart ? take(kArea) : dtu;
        const std::int64_t states = dstate * kScanChannels;  // also kScanSteps * dstate
        A = take(states);
        h = take(states);
        B = take(states);
        C = take(states);
        D = take(kScanChannels);
        bias = take(kScanChannels);
        limit = take(kScanChannels);
        end = memory;
    }

    void clear() const { std::memset(begin, 0, sizeof(T) * static_cast<std::size_t>(end - begin)); }

    /// Uses what another block's tile has for the steps, and the B and C of their group.
    void share_steps(const ScanTile& other, const SelectiveScanArgs& args) {
        dt = other.dt;
        dtu = other.dtu;
        y = other.y;
        u = other.u;
        raw = other.raw;
        z = other.z;
        if (args.B.ndim == 4) B = other.B;
        if (args.C.ndim == 4) C = other.C;
    }

    /// What load_parameters writes, in memory of its own: then it stays while other blocks come.
    static std::int64_t parameter_elements(std::int64_t dstate) {
        return 3 * (dstate + 1) * kScanChannels;
    }
    void place_parameters(const SelectiveScanArgs& args, T* memory, std::int64_t dstate) {
        const std::int64_t states = dstate * kScanChannels;
        A = memory;
        if (args.B.ndim == 2) B = A + states;
        if (args.C.ndim == 2) C = A + 2 * states;
        D = A + 3 * states;
        bias = D + kScanChannels;
        limit = bias + kScanChannels;
    }

    void load_parameters(const SelectiveScanArgs& args, const ScanShape& shape,
                         const ScanBlock& block) const {
        load_tile(A, kScanChannels, channel_state_plane(args.A, 0, block.channel), shape.dstate,
                  block.width);
        // No product dt A may reach infinity, since exp2 takes only finite arguments: A is cut at
        // 1e30 and dt where the largest product of its channel would pass 3e38. The decay is 0 (or
        // infinite) long before either.
        T largest[kScanChannels];
        for (std::int64_t c = 0; c < kScanChannels; ++c) largest[c] = 1;
        for (std::int64_t n = 0; n < shape.dstate; ++n)
            for (std::int64_t c = 0; c < kScanChannels; ++c) {
                T& rate = A[n * kScanChannels + c];
                rate *= kLog2e<T>;
                rate = rate < T(-1e30) ? T(-1e30) : rate > T(1e30) ? T(1e30) : rate;
                const T size = rate < 0 ? -rate : rate;
                largest[c] = size > largest[c] ? size : largest[c];
            }
        for (std::int64_t c = 0; c < kScanChannels; ++c) limit[c] = T(3e38) / largest[c];
        if (args.B.ndim == 2)
            load_tile(B, kScanChannels, channel_state_plane(args.B, 0, block.channel), shape.dstate,
                      block.width);
        if (args.C.ndim == 2)
            load_tile(C, kScanChannels, channel_state_plane(args.C, 0, block.channel), shape.dstate,
                      block.width);
        if (args.D.ndim >= 0)
            load_tile(D, kScanChannels, channel_plane(args.D, block.channel), 1, block.width);
        if (args.dt_bias.ndim >= 0)
            load_tile(bias, kScanChannels, channel_plane(args.dt_bias, block.channel), 1,
                      block.width);
    }

    /// B and C of the steps from t0 on; the same for all blocks of a group.
    void load_groups(const SelectiveScanArgs& args, const ScanShape& shape, const ScanBlock& block,
                     std::int64_t t0, std::int64_t steps) const {
        if (args.B.ndim == 4)
            load_tile(B, shape.dstate, group_plane(args.B, shape, block, t0), steps, shape.dstate);
        if (args.C.ndim == 4)
            load_tile(C, shape.dstate, group_plane(args.C, shape, block, t0), steps, shape.dstate);
    }

    /// u and delta from t0 on, the step sizes, and the skip term D u as the output so far. Returns
    /// whether every exponent dt A is in the range of exp2_bounded, if that is of any use.
    bool load_inputs(const SelectiveScanArgs& args, const ScanBlock& block, std::int64_t t0,
                     std::int64_t steps) const {
        const Rows<const T> in =
            rows_of(sequence_plane(args.u, block, t0), u, kScanChannels, steps, block.width);
        const Rows<const T> delta =
            rows_of(sequence_plane(args.delta, block, t0), raw, kScanChannels, steps, block.width);
        return args.softplus ? prepare<true>(in, delta, block.padded_width, steps)
                             : prepare<false>(in, delta, block.padded_width, steps);
    }

    template <bool kSoftplus>
    bool prepare(const Rows<const T>& in, const Rows<const T>& delta, std::int64_t width,
                 std::int64_t steps) const {
        const bool keep = u != y;
        Vec<T> excess = zero<T>();
        for (std::int64_t lane = 0; lane < width; lane += kLanes<T>) {
            const Vec<T> offset = load<T>(bias + lane), skip = load<T>(D + lane),
                         high = load<T>(limit + lane);
            Vec<T> largest = zero<T>();
            const auto at = [&]<int kCount>(std::int64_t t) __attribute__((always_inline)) {
                Vec<T> x[kCount], size[kCount];
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i)
                    size[i] = x[i] = load<T>(delta.data + (t + i) * delta.pitch + lane) + offset;
                if constexpr (kSoftplus) softplus<T, kCount>(size);
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i) {
                    const std::int64_t to = (t + i) * kScanChannels + lane;
                    const Vec<T> input = load<T>(in.data + (t + i) * in.pitch + lane);
                    if (keep) {
                        store<T>(u + to, input);
                        store<T>(raw + to, x[i]);
                    }
                    // This way round, a NaN leaves the largest one as it is.
                    if constexpr (kBoundsExp2<T>) largest = at_least(largest, absolute(size[i]));
                    store<T>(dt + to, at_least(at_most(size[i], high), -high));
                    store<T>(dtu + to, size[i] * input);
                    store<T>(y + to, skip * input);
                }
            };
            std::int64_t t = 0;
            for (; t + 4 <= steps; t += 4) at.template operator()<4>(t);
            for (; t < steps; ++t) at.template operator()<1>(t);
            // `limit` times the largest |A| of a channel is 3e38.
            if constexpr (kBoundsExp2<T>)
                excess = at_least(excess, largest - high * (T(125) / T(3e38)));
        }
        T lanes[kLanes<T>];
        store<T>(lanes, excess);
        bool in_range = kBoundsExp2<T>;
        for (const T lane : lanes) in_range = in_range && !(lane > 0);
        return in_range;
    }

    /// The state with which a run begins.
    void enter(const SelectiveScanArgs& args, const ScanShape& shape, const ScanBlock& block,
               std::int64_t state_in) const {
        if (state_in == Run::kContinue) return;
        if (state_in == Run::kZero || args.initial_state.ndim < 0)
            std::memset(h, 0, sizeof(T) * static_cast<std::size_t>(shape.dstate * kScanChannels));
        else
            load_tile(h, kScanChannels,
                      channel_state_plane(args.initial_state, state_in, block.channel),
                      shape.dstate, block.width);
    }
};

}  // namespace ssm::cpu::SSM_ISA
