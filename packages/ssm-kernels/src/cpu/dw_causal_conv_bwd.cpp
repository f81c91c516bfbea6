// Causal convolution, backward. A task owns a range of channels over a range of steps and walks it
// from the last step to the first, since dx of a step needs the gradients of the W - 1 steps after
// it. The value before the activation is computed again from x.
// docs/ops/dw_causal_conv.md#backward
#include <ssm/dw_causal_conv.h>

#include "../op/scratch.h"
#include "dw_causal_conv_filter.h"

namespace ssm::cpu::SSM_ISA {

namespace {

template <LaneAxis axis>
struct Cut {
    static constexpr bool kTime = axis == LaneAxis::time;
    static constexpr std::int64_t kChannels = kTime ? 16 : 64;
    static constexpr std::int64_t kSteps = kTime ? 2048 : 512;    // of a task: one part of dweight
    static constexpr std::int64_t kTileSteps = kTime ? 128 : 32;  // x, g and dx fit in the L1 cache
};

// Dense arrays of one thread in the compute type, all with one pitch.
template <LaneAxis axis, class T>
struct GradTile {
    using C = Cut<axis>;
    static constexpr std::int64_t kStep = C::kTime ? kLanes<T> : 1;   // steps in a vector
    static constexpr std::int64_t kGroup = C::kTime ? 1 : kLanes<T>;  // channels in a vector
    std::int64_t pitch, width;
    T* x;  // W - 1 inputs before a segment, then its own
    T* g;  // dy, then the gradient before the activation; then that of the W - 1 steps after
    T* dx;
    T* edge;    // W - 1 steps: gradient of a final state
    T* weight;  // [channel][tap] or [tap][channel]
    T* bias;    // [channel]
    T* sums;    // [channel, or vector of channels][tap, then bias][lane]
    T* zeros;   // a line
    T* end;

    // A tile must also hold the W - 1 steps after a task, and a vector that begins in it.
    static std::int64_t steps_of(std::int64_t width) {
        return max(C::kTileSteps, width) + width - 1 + kLanes<T>;
    }
    static std::int64_t sums_of(std::int64_t width) {
        return (width + 1) * C::kChannels / kGroup * kLanes<T>;
    }
    static std::int64_t elements(std::int64_t width) {
        return (4 * steps_of(width) + width + 1) * C::kChannels + sums_of(width) +
               max(C::kChannels, C::kTileSteps);
    }

    GradTile(T* memory, std::int64_t taps) : width(taps) {
        const std::int64_t steps = steps_of(width);
        pitch = C::kTime ? steps : C::kChannels;
        T** const areas[] = {&x, &g, &dx, &edge};
        for (T** area : areas) {
            *area = memory;
            memory += steps * C::kChannels;
        }
        weight = memory;
        bias = weight + width * C::kChannels;
        sums = bias + C::kChannels;
        zeros = sums + sums_of(width);
        end = zeros + max(C::kChannels, C::kTileSteps);
    }
    std::int64_t history() const { return width - 1; }
    std::int64_t at(std::int64_t channel, std::int64_t step) const {
        return offset<axis>(pitch, channel, step);
    }
    Vec<T> weight_vector(std::int64_t channel, std::int64_t k) const {
        return C::kTime ? broadcast(weight[channel * width + k])
                        : load<T>(weight + k * pitch + channel);
    }
    Vec<T> bias_vector(std::int64_t channel) const {
        return C::kTime ? broadcast(bias[channel]) : load<T>(bias + channel);
    }

    void load_parameters(const DwCausalConvArgs& args, const Channels& channels) const {
        std::memset(bias, 0, sizeof(T) * static_cast<std::size_t>(end - bias));
        const TensorView& w = args.weight;
        load_tile(weight, C::kTime ? width : pitch,
                  plane_at(w, channels.first * w.stride[0], w.stride[C::kTime ? 0 : 1],
                           w.stride[C::kTime ? 1 : 0]),
                  C::kTime ? channels.count : width, C::kTime ? width : channels.count);
        if (args.bias.ndim >= 0)
            load_tile(
                bias, 0,
                plane_at(args.bias, channels.first * args.bias.stride[0], 0, args.bias.stride[0]),
                1, channels.count);
    }

    // Moves the gradients at the front behind a segment of `steps`; zero follows them.
    void shift_gradients(std::int64_t channels, std::int64_t steps, std::int64_t count) const {
        const std::int64_t lines = C::kTime ? channels : 1, line = C::kTime ? 1 : pitch;
        for (std::int64_t c = 0; c < lines; ++c) {
            T* const from = g + c * pitch;
            std::memmove(from + steps * line, from,
                         sizeof(T) * static_cast<std::size_t>(count * line));
            std::memset(from + (steps + count) * line, 0,
                        sizeof(T) * static_cast<std::size_t>((history() - count) * line));
        }
    }
};

// Where the loops find a segment: in the tensors where these hold whole vectors of T, else in the
// tile. Those of x begin W - 1 steps before it. Types that are converted always take the tile,
// whose one pitch saves addresses.
template <LaneAxis axis, class T, bool kDirect>
struct Places {
    // The segment before this one is next. Its lines lie pages apart, which the processor does not
    // foresee: they are asked for while this segment is at work, into the second-level cache.
    struct Line {
        const T* data;
        std::int64_t channel_stride, step_stride;
    };
    const T* x;
    const T* dy;
    T* dx;
    std::int64_t x_pitch, dy_pitch, dx_pitch;
    Line next[3];
    bool is_requested = false;

    explicit Places(const GradTile<axis, T>& tile)
        : x(tile.x),
          dy(tile.g),
          dx(tile.dx),
          x_pitch(tile.pitch),
          dy_pitch(tile.pitch),
          dx_pitch(tile.pitch) {}
};

// Asks for the lines that begin at a vector; called for every vector.
template <LaneAxis axis, class T, bool kDirect>
SSM_INLINE void request(const Places<axis, T, kDirect>& places, std::int64_t channel,
                        std::int64_t step) {
    constexpr std::int64_t kLine = 64 / sizeof(T);
    const std::int64_t lane = axis == LaneAxis::time ? step : channel;
    if (!kDirect || !places.is_requested || lane % kLine != 0) return;
    for (const auto& line : places.next)
        __builtin_prefetch(line.data + channel * line.channel_stride + step * line.step_stride, 0,
                           2);
}

// g = dy act'(bias + sum_k weight_k x_k) over the first `steps` of a tile.
template <LaneAxis axis, class T, bool kDirect, int kWidth, bool kSilu>
void differentiate(const GradTile<axis, T>& tile, const Places<axis, T, kDirect>& places,
                   std::int64_t channels, std::int64_t steps) {
    if constexpr (!kSilu) return;
    constexpr std::int64_t step = GradTile<axis, T>::kStep, group = GradTile<axis, T>::kGroup;
    const std::int64_t x_pitch = kDirect ? places.x_pitch : tile.pitch;
    const std::int64_t dy_pitch = kDirect ? places.dy_pitch : tile.pitch;
    const std::int64_t width = kWidth > 0 ? kWidth : tile.width;
    for (std::int64_t c = 0; c < channels; c += group) {
        const Vec<T> bias = tile.bias_vector(c);
        const T* const x = places.x + offset<axis>(x_pitch, c, 0);
        const T* const dy = places.dy + offset<axis>(dy_pitch, c, 0);
        T* const g = tile.g + tile.at(c, 0);
        // Leaves the gradients of kCount vectors from step t on in `a`.
        const auto at = [&]<int kCount>(std::int64_t t, Vec<T>* a) __attribute__((always_inline)) {
            Vec<T> divisor[kCount];
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) a[i] = bias;
#pragma GCC unroll 4
            for (std::int64_t k = 0; k < width; ++k) {
                const Vec<T> weight = tile.weight_vector(c, k);
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i)
                    a[i] += load<T>(x + offset<axis>(x_pitch, 0, t + i * step + k)) * weight;
            }
            one_plus_exp_minus<kCount>(a, divisor);
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) {
                const Vec<T> s = T(1) / divisor[i];
                a[i] = load<T>(dy + offset<axis>(dy_pitch, 0, t + i * step)) *
                       (s * (T(1) + a[i] * (T(1) - s)));
            }
        };
        std::int64_t t = 0;
        Vec<T> a[4];
        for (; t + 4 * step <= steps; t += 4 * step) {
            at.template operator()<4>(t, a);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) store<T>(g + tile.at(0, t + i * step), a[i]);
        }
        for (; t < steps; t += step) {
            at.template operator()<1>(t, a);
            if (t + step <= steps)
                store<T>(g + tile.at(0, t), a[0]);
            else
                store_part<T>(g + tile.at(0, t), a[0], steps - t);  // what follows is needed
        }
    }
}

// dx of a segment, and its part of the sums for dweight and dbias: summed by itself and then added,
// so that the error grows more slowly than in one long sum.
template <LaneAxis axis, class T, bool kDirect, int kWidth>
void accumulate(const GradTile<axis, T>& tile, const Places<axis, T, kDirect>& places,
                std::int64_t channels, std::int64_t steps) {
    constexpr std::int64_t step = GradTile<axis, T>::kStep, group = GradTile<axis, T>::kGroup;
    constexpr std::int64_t n = kLanes<T>;
    const std::int64_t width = kWidth > 0 ? kWidth : tile.width,
                       next = step_pitch<axis>(tile.pitch);
    const std::int64_t x_pitch = kDirect ? places.x_pitch : tile.pitch;
    const std::int64_t dx_pitch = kDirect ? places.dx_pitch : tile.pitch;
    const std::int64_t whole = steps / step * step;
    for (std::int64_t c = 0; c < channels; c += group) {
        T* const sums = tile.sums + c / group * (width + 1) * n;
        // A few taps at a time, so that their sums stay in registers.
        constexpr int kTaps = kWidth > 0 ? kWidth : 4;
        for (std::int64_t first = 0; first < width; first += kTaps) {
            const int taps = kWidth > 0 ? kWidth : static_cast<int>(min(kTaps, width - first));
            Vec<T> sum[kTaps];
            for (int k = 0; k < kTaps; ++k) sum[k] = zero<T>();
            const T* const x = places.x + offset<axis>(x_pitch, c, first);
            const T* const g = tile.g + tile.at(c, 0);
            for (std::int64_t t = 0; t < whole; t += step) {
                const Vec<T> gradient = load<T>(g + tile.at(0, t));
#pragma GCC unroll 4
                for (int k = 0; k < taps; ++k)
                    sum[k] += gradient * load<T>(x + offset<axis>(x_pitch, 0, t + k));
            }
            if (whole < steps) {
                const Vec<T> gradient = load_part<T>(g + tile.at(0, whole), steps - whole);
                for (int k = 0; k < taps; ++k)
                    sum[k] += gradient *
                              load_part<T>(x + offset<axis>(x_pitch, 0, whole + k), steps - whole);
            }
            for (int k = 0; k < taps; ++k) {
                T* const to = sums + (first + k) * n;
                store<T>(to, load<T>(to) + sum[k]);
            }
        }
        Vec<T> total = zero<T>();
        for (std::int64_t t = 0; t < steps; t += step) {
            const T* const g = tile.g + tile.at(c, t);
            request(places, c, t);
            total += t < whole ? load<T>(g) : load_part<T>(g, steps - t);
            Vec<T> dx = zero<T>();
#pragma GCC unroll 4
            for (std::int64_t k = 0; k < width; ++k)
                dx += load<T>(g + (width - 1 - k) * next) * tile.weight_vector(c, k);
            store<T>(places.dx + offset<axis>(dx_pitch, c, t), dx);
        }
        store<T>(sums + width * n, load<T>(sums + width * n) + total);
    }
}

template <LaneAxis axis, class T, bool kDirect>
struct Backward {
    using C = Cut<axis>;
    using Loop = void (*)(const GradTile<axis, T>&, const Places<axis, T, kDirect>&, std::int64_t,
                          std::int64_t);
    const DwCausalConvArgs& args;
    const DwCausalConvGrads& grads;
    const Runs& runs;
    Loop differentiate_loop, accumulate_loop;
    bool asks_ahead;  // pays for data beyond the caches, costs time in them

    Backward(const DwCausalConvArgs& inputs, const DwCausalConvGrads& outputs, const Runs& all)
        : args(inputs), grads(outputs), runs(all) {
        const bool four = args.weight.shape[1] == 4 && sizeof(T) == sizeof(float);
        differentiate_loop = args.silu ? (four ? &differentiate<axis, T, kDirect, 4, true>
                                               : &differentiate<axis, T, kDirect, 0, true>)
                                       : &differentiate<axis, T, kDirect, 0, false>;
        constexpr std::int64_t kFarBytes = 4 << 20;
        asks_ahead = kDirect && is_direct<axis, T>(args.x) && is_direct<axis, T>(grads.dy) &&
                     is_direct<axis, T>(grads.dx) &&
                     static_cast<std::int64_t>(sizeof(T)) * args.x.shape[0] * args.x.shape[1] *
                             args.x.shape[2] >=
                         kFarBytes;
        accumulate_loop =
            four ? &accumulate<axis, T, kDirect, 4> : &accumulate<axis, T, kDirect, 0>;
    }

    // What comes after a segment in its sequence.
    struct Following {
        std::int64_t count;  // gradients at the front of tile.g, at most W - 1
        std::int64_t state;  // with fewer: the final state that the sequence ends in, or Run::kNone
    };

    void load_x(const GradTile<axis, T>& tile, std::int64_t row, const Run* run,
                const Channels& channels, std::int64_t t, std::int64_t count) const {
        const std::int64_t history = tile.history();
        if (t - run->begin >= history) {
            load_steps<axis>(tile.x, tile.pitch, args.x, row, channels, t - history,
                             history + count);
        } else {
            load_window<axis>(tile.x, tile.pitch, args.x, args.initial_state, row, run, channels, t,
                              history);
            load_steps<axis>(tile.x + tile.at(0, history), tile.pitch, args.x, row, channels, t,
                             count);
        }
    }

    // Computes the gradients of the W - 1 steps that follow step t of `run`, which another task
    // owns.
    Following look_ahead(const GradTile<axis, T>& tile, std::int64_t row, const Run* run,
                         const Channels& channels, std::int64_t t) const {
        const std::int64_t history = tile.history();
        const Run* const end_run = runs.runs + runs.row_begin[row + 1];
        Following following{0, run->state_out};
        load_x(tile, row, run, channels, t, 0);
        for (; following.count < history; t = run->begin) {
            const std::int64_t count = min(run->end - t, history - following.count);
            if (count > 0) {
                load_steps<axis>(tile.x + tile.at(0, history + following.count), tile.pitch, args.x,
                                 row, channels, t, count);
                load_steps<axis>(tile.g + tile.at(0, following.count), tile.pitch, grads.dy, row,
                                 channels, t, count);
                following.count += count;
            }
            following.state = run->state_out;
            if (++run == end_run || run->state_in != Run::kContinue) break;
        }
        differentiate_loop(tile, Places<axis, T, kDirect>(tile), channels.count, following.count);
        return following;
    }

    // Adds the gradient of the final state to the inputs that it holds.
    void add_final_state(const GradTile<axis, T>& tile, const Channels& channels,
                         std::int64_t steps, const Following& following) const {
        const std::int64_t oldest = steps + following.count - tile.history();
        for (std::int64_t c = 0; c < channels.count; ++c)
            for (std::int64_t t = max(oldest, 0); t < steps; ++t)
                tile.dx[tile.at(c, t)] += tile.edge[tile.at(c, t - oldest)];
    }

    // The gradient of the initial state, from the first gradients of its sequence and, where that
    // is shorter than the state, from the final state. It takes the place of x.
    void find_initial_state(const GradTile<axis, T>& tile, const Channels& channels,
                            std::int64_t length, bool reaches_end) const {
        for (std::int64_t c = 0; c < channels.count; ++c)
            for (std::int64_t p = 0; p < tile.history(); ++p) {
                T sum = reaches_end && p >= length ? tile.edge[tile.at(c, p - length)] : T(0);
                for (std::int64_t i = 0; i <= p && i < length; ++i)
                    sum +=
                        tile.g[tile.at(c, i)] *
                        tile.weight[C::kTime ? c * tile.width + p - i : (p - i) * tile.pitch + c];
                tile.x[tile.at(c, p)] = sum;
            }
    }

    // One segment of a run: `steps` steps from t on.
    Following segment(const GradTile<axis, T>& tile, std::int64_t row, const Run* run,
                      const Channels& channels, std::int64_t t, std::int64_t steps,
                      const Following& following) const {
        const std::int64_t history = tile.history();
        const bool reaches_end = following.count < history && following.state != Run::kNone &&
                                 grads.dfinal_state.ndim >= 0;
        // Vectors that the tensors hold whole need no copy.
        const bool is_whole = kDirect && (C::kTime ? steps : channels.count) % kLanes<T> == 0;
        const bool reads_x = is_whole && t - run->begin >= history && is_direct<axis, T>(args.x);
        const bool reads_dy = is_whole && args.silu && is_direct<axis, T>(grads.dy);
        const bool writes_dx = is_whole && !reaches_end && is_direct<axis, T>(grads.dx);
        Places<axis, T, kDirect> places(tile);
        const auto place = [&](const TensorView& view, std::int64_t step, auto*& at,
                               std::int64_t& pitch) {
            at = static_cast<T*>(steps_plane<axis>(view, row, channels.first, step).data);
            pitch = line_stride<axis>(view);
        };
        places.is_requested = asks_ahead;
        if (asks_ahead) {
            const TensorView* const views[] = {&args.x, &grads.dy, &grads.dx};
            for (int i = 0; i < 3; ++i) {
                const TensorView& view = *views[i];
                const Plane plane =
                    steps_plane<axis>(view, row, channels.first, max(t - C::kTileSteps, 0));
                places.next[i] = {static_cast<const T*>(plane.data), view.stride[1],
                                  view.stride[2]};
            }
        }
        tile.shift_gradients(channels.count, steps, following.count);
        if (reads_x)
            place(args.x, t - history, places.x, places.x_pitch);
        else
            load_x(tile, row, run, channels, t, steps);
        if (reads_dy)
            place(grads.dy, t, places.dy, places.dy_pitch);
        else
            load_steps<axis>(tile.g, tile.pitch, grads.dy, row, channels, t, steps);
        if (writes_dx) place(grads.dx, t, places.dx, places.dx_pitch);
        differentiate_loop(tile, places, channels.count, steps);
        accumulate_loop(tile, places, channels.count, steps);
        if (reaches_end) {
            load_steps<axis>(tile.edge, tile.pitch, grads.dfinal_state, following.state, channels,
                             0, history);
            add_final_state(tile, channels, steps, following);
        }
        if (!writes_dx) store_steps<axis>(grads.dx, row, channels, t, tile.dx, tile.pitch, steps);
        if (t == run->begin && run->state_in >= 0 && grads.dinitial_state.ndim >= 0) {
            find_initial_state(tile, channels, steps + following.count, reaches_end);
            store_steps<axis>(grads.dinitial_state, run->state_in, channels, 0, tile.x, tile.pitch,
                              history);
        }
        return {min(history, steps + following.count), following.state};
    }

    void block(const GradTile<axis, T>& tile, std::int64_t row, const Channels& channels,
               std::int64_t first, std::int64_t last) const {
        const Run* const begin_run = runs.runs + runs.row_begin[row];
        const Run* const end_run = runs.runs + runs.row_begin[row + 1];
        const Run* run = first_run_after(runs, row, last - 1);
        constexpr std::int64_t kZeros = C::kTime ? C::kTileSteps : C::kSteps;
        if (begin_run == end_run) {
            store_zeros<axis>(grads.dx, row, channels, first, last, tile.zeros, kZeros);
            return;
        }
        if (run == end_run || run->begin >= last) --run;
        Following following{0, Run::kNone};
        if (run >= begin_run && run->end > first)
            following = look_ahead(tile, row, run, channels, min(run->end, last));
        std::int64_t done = last;
        for (; run >= begin_run && run->end > first; --run) {
            const std::int64_t begin = max(run->begin, first);
            std::int64_t end = min(run->end, last);
            store_zeros<axis>(grads.dx, row, channels, end, done, tile.zeros, kZeros);
            done = begin;
            const bool is_last = run + 1 == end_run || run[1].state_in != Run::kContinue;
            if (is_last && run->end <= last) following = {0, run->state_out};
            while (end > begin) {
                const std::int64_t steps = min(C::kTileSteps, end - begin);
                end -= steps;
                following = segment(tile, row, run, channels, end, steps, following);
            }
        }
        store_zeros<axis>(grads.dx, row, channels, first, done, tile.zeros, kZeros);
    }

    // Writes the sums of a task as [channel][tap, then bias].
    void store_sums(const GradTile<axis, T>& tile, const Channels& channels, T* to) const {
        constexpr std::int64_t group = GradTile<axis, T>::kGroup, n = kLanes<T>;
        const std::int64_t count = tile.width + 1;
        for (std::int64_t c = 0; c < channels.count; ++c)
            for (std::int64_t k = 0; k < count; ++k) {
                const T* const lanes = tile.sums + (c / group * count + k) * n;
                to[c * count + k] = C::kTime ? reduce_add<T>(load<T>(lanes)) : lanes[c % group];
            }
    }
};

// dweight and dbias: the parts in their order, whoever computed them.
template <class T>
void add_parts(const DwCausalConvGrads& grads, const T* parts, std::int64_t count, int threads) {
    constexpr std::int64_t kChannels = 64;
    const std::int64_t dim = grads.dweight.shape[0], width = grads.dweight.shape[1],
                       pitch = width + 1;
    const std::int64_t blocks = (dim + kChannels - 1) / kChannels;
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(pitch * blocks * kChannels));
    parallel_for(blocks, threads, [&](std::int64_t block, int) {
        const std::int64_t first = block * kChannels, channels = min(kChannels, dim - first);
        T* const sum = static_cast<T*>(scratch.data()) + first * pitch;
        std::memset(sum, 0, sizeof(T) * static_cast<std::size_t>(channels * pitch));
        for (std::int64_t part = 0; part < count; ++part) {
            const T* const from = parts + (part * dim + first) * pitch;
            for (std::int64_t i = 0; i < channels * pitch; ++i) sum[i] += from[i];
        }
        const TensorView& dweight = grads.dweight;
        store_tile(
            plane_at(dweight, first * dweight.stride[0], dweight.stride[0], dweight.stride[1]), sum,
            pitch, channels, width);
        if (grads.dbias.ndim >= 0)
            store_tile(
                plane_at(grads.dbias, first * grads.dbias.stride[0], grads.dbias.stride[0], 1),
                sum + width, pitch, channels, 1);
    });
}

template <LaneAxis axis, class T, bool kDirect>
void differentiate_rows(const DwCausalConvArgs& args, const DwCausalConvGrads& grads,
                        const Runs& runs, int threads) {
    using C = Cut<axis>;
    const std::int64_t batch = args.x.shape[0], dim = args.x.shape[1], seqlen = args.x.shape[2];
    const std::int64_t width = args.weight.shape[1];
    const std::int64_t blocks = (dim + C::kChannels - 1) / C::kChannels;
    const std::int64_t steps_parts = (seqlen + C::kSteps - 1) / C::kSteps;
    // Short rows share a task: else their partial sums would outweigh them.
    const std::int64_t rows = max(1, C::kSteps / max(seqlen, 1));
    const std::int64_t parts = (batch + rows - 1) / rows * steps_parts;
    const Backward<axis, T, kDirect> backward(args, grads, runs);
    const std::int64_t elements = (GradTile<axis, T>::elements(width) + 15) / 16 * 16;
    const std::int64_t sums = parts * dim * (width + 1);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * threads + sums));
    T* const memory = static_cast<T*>(scratch.data());
    T* const partial = memory + elements * threads;
    parallel_for(parts * blocks, threads, [&](std::int64_t task, int thread) {
        // Neighbouring tasks are neighbours in memory.
        const std::int64_t part =
            C::kTime ? task / (blocks * steps_parts) * steps_parts + task % steps_parts
                     : task / blocks;
        const std::int64_t block = C::kTime ? task / steps_parts % blocks : task % blocks;
        const Channels channels{block * C::kChannels,
                                min(C::kChannels, dim - block * C::kChannels)};
        const GradTile<axis, T> tile(memory + elements * thread, width);
        tile.load_parameters(args, channels);
        const std::int64_t first = part % steps_parts * C::kSteps, row = part / steps_parts * rows;
        for (std::int64_t r = row; r < min(row + rows, batch); ++r)
            backward.block(tile, r, channels, first, min(first + C::kSteps, seqlen));
        backward.store_sums(tile, channels, partial + (part * dim + channels.first) * (width + 1));
    });
    add_parts(grads, partial, parts, threads);
}

template <class T, bool kDirect>
void differentiate_all(const DwCausalConvArgs& args, const DwCausalConvGrads& grads,
                       const Runs& runs, int threads) {
    // A sequence without steps hands its state on unchanged.
    if (grads.dinitial_state.ndim >= 0 && (args.x.shape[2] == 0 || !runs.covers_all))
        copy_conv_states<T>(grads.dfinal_state, grads.dinitial_state, threads);
    if (lane_axis<T>(args.x) == LaneAxis::time)
        differentiate_rows<LaneAxis::time, T, kDirect>(args, grads, runs, threads);
    else
        differentiate_rows<LaneAxis::channel, T, kDirect>(args, grads, runs, threads);
}

}  // namespace

void dw_causal_conv_bwd(const DwCausalConvArgs& args, const DwCausalConvGrads& grads,
                        const Runs& runs, int threads) {
    if (args.x.dtype == DType::f64)
        differentiate_all<double, true>(args, grads, runs, threads);
    else if (args.x.dtype == DType::f32)
        differentiate_all<float, true>(args, grads, runs, threads);
    else
        differentiate_all<float, false>(args, grads, runs, threads);
}

}  // namespace ssm::cpu::SSM_ISA
