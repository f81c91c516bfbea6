// The selective scan backwards in one tile of one block: the states inside are computed again from
// its checkpoint, then the adjoint runs back over them. docs/ops/selective_scan.md#backward
#pragma once

#include "gate.h"
#include "selective_scan_tile.h"

namespace ssm::cpu::SSM_ISA {

/// Sums over channels stay apart by lane until a tile is done. The lanes of so many states share a
/// vector: lane i is of state i % kFolded. States that are left over have a vector each.
template <class T>
constexpr int kFolded = kLanes<T> < 4 ? kLanes<T> : 4;

template <class T>
SSM_INLINE std::int64_t lane_sums(std::int64_t dstate) {
    return dstate / kFolded<T> + dstate % kFolded<T>;
}
/// The vector of the kStates states from `first` on.
template <class T, int kStates>
SSM_INLINE std::int64_t lane_sum(std::int64_t first, std::int64_t dstate) {
    return kStates > 1 ? first / kFolded<T> : first - dstate / kFolded<T> * (kFolded<T> - 1);
}
/// Adds kStates vectors to the one that they share. Uses up `rows`.
template <class T, int kStates>
SSM_INLINE void add_lanes(T* sum, Vec<T>* rows) {
    store<T>(sum, load<T>(sum) + sum_lanes<T, kStates>(rows));
}

/// Gradients of one tile, and sums over channels that stay apart by lane until the tile is done.
template <class T>
struct GradTile {
    T* dy;       // [step][channel]   times silu(z)
    T* dz;       // [step][channel]
    T* ddt;      // [step][channel]   through the decay, in units of log2
    T* ddtu;     // [step][channel]   through the input dt u
    T* entry;    // [segment][state][channel]   state before each stretch of the tile
    T* lane_dB;  // [lane sum][step][lane]
    T* lane_dC;  // [lane sum][step][lane]

    static std::int64_t elements(std::int64_t dstate) {
        return 4 * ScanTile<T>::kArea + kScanSteps * dstate * kScanChannels +
               2 * lane_sums<T>(dstate) * kScanSteps * kLanes<T>;
    }
    GradTile(T* memory, std::int64_t dstate) {
        constexpr std::int64_t area = ScanTile<T>::kArea;
        dy = memory;
        dz = dy + area;
        ddt = dz + area;
        ddtu = ddt + area;
        entry = ddtu + area;
        lane_dB = entry + kScanSteps * dstate * kScanChannels;
        lane_dC = lane_dB + lane_sums<T>(dstate) * kScanSteps * kLanes<T>;
    }
};

/// Sums of one block over the whole row: [state][channel] each, then [channel] each.
template <class T>
struct BlockSums {
    T* dh;
    T* dA;
    T* dB;  // used when B is constant over time
    T* dC;  // used when C is constant over time
    T* dD;
    T* dbias;

    static std::int64_t elements(std::int64_t dstate) { return (4 * dstate + 2) * kScanChannels; }
    BlockSums(T* memory, std::int64_t dstate)
        : dh(memory),
          dA(dh + dstate * kScanChannels),
          dB(dA + dstate * kScanChannels),
          dC(dB + dstate * kScanChannels),
          dD(dC + dstate * kScanChannels),
          dbias(dD + kScanChannels) {}
};

/// Forward and backward over the steps [begin, end) for kStates states of one vector of channels.
/// The inputs of a vector, and what is kept of four states, fit in the first-level cache together.
template <class T, int kStates, bool kConstB, bool kConstC, bool kInRange>
SSM_INLINE void differentiate_states(const ScanTile<T>& tile, const GradTile<T>& grad,
                                     const BlockSums<T>& sums, const T* entry, const NextTile& next,
                                     std::int64_t dstate, std::int64_t first, std::int64_t lane,
                                     std::int64_t pass, std::int64_t passes, std::int64_t begin,
                                     std::int64_t end) {
    constexpr int lanes = kLanes<T>;
    alignas(64) T decays[kScanSteps * kStates * lanes];
    alignas(64) T before[kScanSteps * kStates * lanes];
    const std::int64_t at = first * kScanChannels + lane;
    T* const lane_dB = grad.lane_dB + lane_sum<T, kStates>(first, dstate) * kScanSteps * lanes;
    T* const lane_dC = grad.lane_dC + lane_sum<T, kStates>(first, dstate) * kScanSteps * lanes;
    // Every pass over the steps asks for some of what the next tile needs.
    const int first_plane = static_cast<int>(pass * next.count / passes);
    const int end_plane = static_cast<int>((pass + 1) * next.count / passes);
    Vec<T> h[kStates], rate[kStates], sum_c[kStates];
    for (int n = 0; n < kStates; ++n) {
        h[n] = load<T>(entry + at + n * kScanChannels);
        rate[n] = load<T>(tile.A + at + n * kScanChannels);
        sum_c[n] = zero<T>();
    }
    for (std::int64_t t = begin; t < end; ++t) {
        for (int i = first_plane; i < end_plane; ++i) NextTile::request(next, i, t);
        const std::int64_t i = t * kScanChannels + lane;
        const Vec<T> dt = load<T>(tile.dt + i), dtu = load<T>(tile.dtu + i),
                     dy = load<T>(grad.dy + i);
        Vec<T> y = load<T>(tile.y + i), a[kStates], dC[kStates];
        for (int n = 0; n < kStates; ++n) a[n] = dt * rate[n];
        decay<T, kInRange, kStates>(a);
#pragma GCC unroll 4
        for (int n = 0; n < kStates; ++n) {
            store<T>(decays + (t * kStates + n) * lanes, a[n]);
            store<T>(before + (t * kStates + n) * lanes, h[n]);
            h[n] = a[n] * h[n] + dtu * input_vector<kConstB>(tile.B, dstate, t, first + n, lane);
            y += h[n] * input_vector<kConstC>(tile.C, dstate, t, first + n, lane);
            if constexpr (kConstC)
                sum_c[n] += dy * h[n];
            else
                dC[n] = dy * h[n];
        }
        if constexpr (!kConstC) add_lanes<T, kStates>(lane_dC + t * lanes, dC);
        store<T>(tile.y + i, y);
    }
    Vec<T> dh[kStates], sum_a[kStates], sum_b[kStates];
    for (int n = 0; n < kStates; ++n) {
        dh[n] = load<T>(sums.dh + at + n * kScanChannels);
        sum_a[n] = zero<T>();
        sum_b[n] = zero<T>();
    }
    for (std::int64_t t = end - 1; t >= begin; --t) {
        const std::int64_t i = t * kScanChannels + lane;
        const Vec<T> dt = load<T>(tile.dt + i), dtu = load<T>(tile.dtu + i),
                     dy = load<T>(grad.dy + i);
        Vec<T> ddt = load<T>(grad.ddt + i), ddtu = load<T>(grad.ddtu + i), dB[kStates];
#pragma GCC unroll 4
        for (int n = 0; n < kStates; ++n) {
            dh[n] += dy * input_vector<kConstC>(tile.C, dstate, t, first + n, lane);
            ddtu += dh[n] * input_vector<kConstB>(tile.B, dstate, t, first + n, lane);
            if constexpr (kConstB)
                sum_b[n] += dh[n] * dtu;
            else
                dB[n] = dh[n] * dtu;
            dh[n] *= load<T>(decays + (t * kStates + n) * lanes);
            const Vec<T> through_decay = dh[n] * load<T>(before + (t * kStates + n) * lanes);
            ddt += through_decay * rate[n];
            sum_a[n] += through_decay * dt;
        }
        if constexpr (!kConstB) add_lanes<T, kStates>(lane_dB + t * lanes, dB);
        store<T>(grad.ddt + i, ddt);
        store<T>(grad.ddtu + i, ddtu);
    }
    for (int n = 0; n < kStates; ++n) {
        const std::int64_t i = at + n * kScanChannels;
        store<T>(sums.dh + i, dh[n]);
        store<T>(sums.dA + i, load<T>(sums.dA + i) + sum_a[n]);
        if constexpr (kConstB) store<T>(sums.dB + i, load<T>(sums.dB + i) + sum_b[n]);
        if constexpr (kConstC) store<T>(sums.dC + i, load<T>(sums.dC + i) + sum_c[n]);
    }
}

template <class T, bool kConstB, bool kConstC, bool kInRange>
void differentiate_segment(const ScanTile<T>& tile, const GradTile<T>& grad,
                           const BlockSums<T>& sums, const T* entry, const NextTile& next,
                           std::int64_t dstate, std::int64_t width, std::int64_t begin,
                           std::int64_t end) {
    const std::int64_t passes = width / kLanes<T> * lane_sums<T>(dstate);
    std::int64_t pass = 0;
    for (std::int64_t lane = 0; lane < width; lane += kLanes<T>) {
        std::int64_t n = 0;
        for (; n + kFolded<T> <= dstate; n += kFolded<T>)
            differentiate_states<T, kFolded<T>, kConstB, kConstC, kInRange>(
                tile, grad, sums, entry, next, dstate, n, lane, pass++, passes, begin, end);
        for (; n < dstate; ++n)
            differentiate_states<T, 1, kConstB, kConstC, kInRange>(
                tile, grad, sums, entry, next, dstate, n, lane, pass++, passes, begin, end);
    }
}

template <class T, bool kInRange>
auto differentiate_of(const SelectiveScanArgs& args) {
    return by_inputs(args, []<bool kConstB, bool kConstC>() {
        return &differentiate_segment<T, kConstB, kConstC, kInRange>;
    });
}

/// Moves tile.h over [begin, end) without outputs: the entry of the next segment of the same tile.
template <class T>
void advance_states(const ScanTile<T>& tile, std::int64_t dstate, bool const_b, std::int64_t width,
                    std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = 0; n < dstate; ++n)
        for (std::int64_t lane = 0; lane < width; lane += kLanes<T>) {
            T* const state = tile.h + n * kScanChannels + lane;
            Vec<T> h = load<T>(state);
            for (std::int64_t t = begin; t < end; ++t) {
                const std::int64_t i = t * kScanChannels + lane;
                const Vec<T> b = const_b ? input_vector<true>(tile.B, dstate, t, n, lane)
                                         : input_vector<false>(tile.B, dstate, t, n, lane);
                h = exp2<T>(load<T>(tile.dt + i) * load<T>(tile.A + n * kScanChannels + lane)) * h +
                    load<T>(tile.dtu + i) * b;
            }
            store<T>(state, h);
        }
}

/// Reads dy and turns it into the gradient before the gate.
template <class T>
void load_output_gradient(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                          const ScanTile<T>& tile, const GradTile<T>& grad, const ScanBlock& block,
                          std::int64_t t0, std::int64_t steps) {
    load_tile(grad.dy, kScanChannels, sequence_plane(grads.dy, block, t0), steps, block.width);
    if (args.z.ndim < 0) return;
    const Rows<const T> z =
        rows_of(sequence_plane(args.z, block, t0), tile.z, kScanChannels, steps, block.width);
    const auto at = [&]<int kCount>(std::int64_t t,
                                    std::int64_t lane) __attribute__((always_inline)) {
        Pack<T, kCount> x;
        SSM_EACH(i) x.v[i] = load<T>(z.data + (t + i) * z.pitch + lane);
        const Pack<T, kCount> gate = sigmoid_factor(x);
        SSM_EACH(i) {
            const std::int64_t to = (t + i) * kScanChannels + lane;
            const Vec<T> dy = load<T>(grad.dy + to) * gate.v[i];
            store<T>(grad.dz + to, dy * (T(1) + x.v[i] * (T(1) - gate.v[i])));  // times y later
            store<T>(grad.dy + to, dy * x.v[i]);
        }
    };
    for (std::int64_t lane = 0; lane < block.padded_width; lane += kLanes<T>) {
        std::int64_t t = 0;
        for (; t + 4 <= steps; t += 4) at.template operator()<4>(t, lane);
        for (; t < steps; ++t) at.template operator()<1>(t, lane);
    }
}

/// From the gradients of dt and dt u to those of the inputs, in the places of ddtu (du) and ddt.
template <class T>
void finish_segment(const SelectiveScanArgs& args, const ScanTile<T>& tile, const GradTile<T>& grad,
                    const BlockSums<T>& sums, std::int64_t width, std::int64_t begin,
                    std::int64_t end) {
    constexpr T ln2 = static_cast<T>(0.6931471805599453);
    for (std::int64_t lane = 0; lane < width; lane += kLanes<T>) {
        const Vec<T> skip = load<T>(tile.D + lane);
        Vec<T> sum_d = load<T>(sums.dD + lane), sum_bias = load<T>(sums.dbias + lane);
        const auto at = [&]<int kCount>(std::int64_t t) __attribute__((always_inline)) {
            Vec<T> slope[kCount];
            for (int i = 0; i < kCount; ++i)
                slope[i] = load<T>(tile.raw + (t + i) * kScanChannels + lane);
            if (args.softplus) sigmoid<T, kCount>(slope);
            for (int k = 0; k < kCount; ++k) {
                const std::int64_t i = (t + k) * kScanChannels + lane;
                const Vec<T> u = load<T>(tile.u + i), dy = load<T>(grad.dy + i),
                             ddtu = load<T>(grad.ddtu + i);
                Vec<T> ddt = load<T>(grad.ddt + i) * ln2 + u * ddtu;
                if (args.softplus) ddt *= slope[k];
                sum_bias += ddt;
                sum_d += dy * u;
                store<T>(grad.ddt + i, ddt);
                store<T>(grad.ddtu + i, skip * dy + load<T>(tile.dt + i) * ddtu);
                if (args.z.ndim >= 0)
                    store<T>(grad.dz + i, load<T>(grad.dz + i) * load<T>(tile.y + i));
            }
        };
        std::int64_t t = begin;
        for (; t + 4 <= end; t += 4) at.template operator()<4>(t);
        for (; t < end; ++t) at.template operator()<1>(t);
        store<T>(sums.dD + lane, sum_d);
        store<T>(sums.dbias + lane, sum_bias);
    }
}

template <class T>
void clear_rows(T* area, std::int64_t begin, std::int64_t end) {
    if (begin < end)
        std::memset(area + begin * kScanChannels, 0,
                    sizeof(T) * static_cast<std::size_t>((end - begin) * kScanChannels));
}

/// All segments of one tile of one block. `after` is the first run that begins beyond the tile.
template <class T>
void differentiate_tile(const SelectiveScanArgs& args, const SelectiveScanGrads& grads,
                        const Runs& runs, const ScanShape& shape, const ScanBlock& block,
                        const ScanTile<T>& tile, const GradTile<T>& grad, const BlockSums<T>& sums,
                        const NextTile& next, std::int64_t t0, std::int64_t steps, bool in_range,
                        const Run* after) {
    const Run* const first_run = runs.runs + runs.row_begin[block.row];
    const Run* const end_run = runs.runs + runs.row_begin[block.row + 1];
    const std::int64_t dstate = shape.dstate, states = dstate * kScanChannels;
    const bool const_b = args.B.ndim == 2;
    const auto differentiate =
        in_range ? differentiate_of<T, kBoundsExp2<T>>(args) : differentiate_of<T, false>(args);
    load_tile(tile.h, kScanChannels, checkpoint_plane(args.checkpoints, block, t0), dstate,
              block.width);
    const Run* begin_run = after;
    while (begin_run > first_run && (begin_run - 1)->end > t0) --begin_run;
    std::int64_t done = 0;
    for (const Run* run = begin_run; run < after; ++run) {
        const std::int64_t begin = max(run->begin - t0, 0), end = min(run->end - t0, steps);
        if (run->begin >= t0) tile.enter(args, shape, block, run->state_in);
        std::memcpy(grad.entry + (run - begin_run) * states, tile.h,
                    sizeof(T) * static_cast<std::size_t>(states));
        if (run + 1 < after) advance_states(tile, dstate, const_b, block.padded_width, begin, end);
        for (T* area : {grad.ddt, grad.ddtu, grad.dz}) clear_rows(area, done, begin);
        done = end;
    }
    for (T* area : {grad.ddt, grad.ddtu, grad.dz}) clear_rows(area, done, steps);
    for (const Run* run = after; run-- > begin_run;) {
        const std::int64_t begin = max(run->begin - t0, 0), end = min(run->end - t0, steps);
        const bool continues = run + 1 < end_run && (run + 1)->state_in == Run::kContinue;
        if (run->end <= t0 + steps && !continues) {
            std::memset(sums.dh, 0, sizeof(T) * static_cast<std::size_t>(states));
            if (grads.dlast_state.ndim >= 0 && run->state_out != Run::kNone)
                load_tile(sums.dh, kScanChannels,
                          channel_state_plane(grads.dlast_state, run->state_out, block.channel),
                          dstate, block.width);
        }
        for (T* area : {grad.ddt, grad.ddtu}) clear_rows(area, begin, end);
        differentiate(tile, grad, sums, grad.entry + (run - begin_run) * states, next, dstate,
                      block.padded_width, begin, end);
        finish_segment(args, tile, grad, sums, block.padded_width, begin, end);
        if (grads.dinitial_state.ndim >= 0 && run->begin >= t0 && run->state_in >= 0)
            store_tile(channel_state_plane(grads.dinitial_state, run->state_in, block.channel),
                       sums.dh, kScanChannels, dstate, block.width);
    }
}

/// partial[step][state] = sum over the lanes, for one tile.
template <class T>
void reduce_lanes(T* partial, const T* lane_sums, std::int64_t dstate, std::int64_t steps) {
    constexpr int lanes = kLanes<T>, fold = kFolded<T>;
    constexpr std::int64_t pitch = kScanSteps * lanes;
    const std::int64_t folded = dstate / fold * fold;
    T line[lanes];
    for (std::int64_t n = 0; n < folded; n += lanes) {
        for (std::int64_t t = 0; t < steps; ++t) {
            Vec<T> rows[lanes];
            for (int i = 0; i < lanes; i += fold)
                rows[i] = n + i < folded ? load<T>(lane_sums + (n + i) / fold * pitch + t * lanes)
                                         : zero<T>();
            store<T>(line, sum_lanes<T, lanes, fold>(rows));
            copy_row(partial + t * dstate + n, line, min(lanes, folded - n));
        }
    }
    for (std::int64_t n = folded; n < dstate; ++n)
        for (std::int64_t t = 0; t < steps; t += lanes) {
            const T* const from = lane_sums + lane_sum<T, 1>(n, dstate) * pitch + t * lanes;
            store<T>(line, sum_lanes_of(from));
            for (std::int64_t i = 0; i < min(lanes, steps - t); ++i)
                partial[(t + i) * dstate + n] = line[i];
        }
}

}  // namespace ssm::cpu::SSM_ISA
