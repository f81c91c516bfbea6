// One token, or a few, of the selective recurrence. A task owns some channels of one batch row;
// lanes are states, since those are adjacent in memory, and the sums over states of a square of
// channels are turned into one vector at the end. docs/ops/selective_state_step.md#algorithm
#include <ssm/selective_state_step.h>

#include "../op/scratch.h"
#include "gate.h"
#include "parallel.h"

namespace ssm::cpu::SSM_ISA {

namespace {

constexpr std::int64_t kMostChannels = 256;      // of one task
constexpr std::int64_t kTaskStates = 8192;       // state elements of one task, as far as possible
constexpr std::int64_t kSerialStates = 65536;    // below, waking a thread costs more than it gains
constexpr std::int64_t kCachedStates = 1 << 22;  // up to here caches hold the states
constexpr std::int64_t kOwnStates = 1 << 18;     // up to here those of the threads themselves

/// Sizes of one call and its cut into tasks, which depends on nothing but these sizes.
template <class T>
struct StepShape {
    std::int64_t batch, tokens, heads, headdim, dstate;
    std::int64_t padded_dstate;  // whole vectors
    std::int64_t channels;       // of one task: whole vectors
    std::int64_t blocks;         // tasks per head
    bool tied;                   // A does not depend on n
    bool in_memory;              // the states are more than caches hold

    explicit StepShape(const SelectiveStateStepArgs& args)
        : batch(args.x.shape[0]),
          tokens(args.x.shape[1]),
          heads(args.x.shape[2]),
          headdim(args.x.shape[3]),
          dstate(args.state.shape[3]),
          padded_dstate((dstate + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
          tied(dstate == 1 || (dstate > 0 && args.A.stride[2] == 0)),
          in_memory(held() > kCachedStates) {
        const std::int64_t fitting = kTaskStates / max(padded_dstate, 1) / kLanes<T> * kLanes<T>;
        channels = max(kLanes<T>, min(kMostChannels, fitting));
        channels = min(channels, (headdim + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
        blocks = channels > 0 ? (headdim + channels - 1) / channels : 0;
    }
    std::int64_t held() const { return batch * heads * headdim * dstate; }
    std::int64_t advanced() const { return tokens * held(); }
};

/// Some channels at one token. Rows of h and A are whole vectors long.
template <class T>
struct Channels {
    T* h;
    std::int64_t h_pitch;
    const T* A;
    std::int64_t A_pitch;
    const T* rate;   // per channel: dt log2(e), or the decay itself where A does not depend on n
    const T* drive;  // per channel: dt x
    const T* B;
    const T* C;
    T* y;
};

/// Advances a vector of the states of kCount channels, of which these are the rows of h and A and
/// the rates and drives, and adds C h to the sums of each. All of them take each step of the
/// exponential together: one after the other they would wait for it.
template <class T, bool kTied, int kCount>
SSM_INLINE void advance_states(T* h, std::int64_t h_pitch, const T* A, std::int64_t A_pitch,
                               const T* rate, const T* drive, Vec<T> b, Vec<T> c, Vec<T>* sums) {
    Vec<T> decay[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
        decay[i] = broadcast(rate[i]);
        if constexpr (!kTied) decay[i] *= load<T>(A + i * A_pitch);
    }
    if constexpr (!kTied) exp2<kCount>(decay);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
        const Vec<T> next = decay[i] * load<T>(h + i * h_pitch) + broadcast(drive[i]) * b;
        store<T>(h + i * h_pitch, next);
        sums[i] += c * next;
    }
}

/// h = decay h + drive B and y = sum_n C h for whole vectors of channels. Walks kGroup channels
/// together; kSingle: a channel has one vector of states.
template <class T, bool kTied, int kGroup, bool kSingle>
void advance(const Channels<T>& given, std::int64_t width, std::int64_t dstate) {
    constexpr int n = kLanes<T>, group = n < kGroup ? n : kGroup;
    // Copies that nothing can point to: stores do not make them be read again.
    const Channels<T> at = given;
    const Vec<T> b = load<T>(at.B), c = load<T>(at.C);
    for (std::int64_t i = 0; i < width; i += n) {
        Vec<T> sums[n] = {};
#pragma GCC unroll 16
        for (int first = 0; first < n; first += group) {
            T* const h = at.h + (i + first) * at.h_pitch;
            const T* const A = at.A + (i + first) * at.A_pitch;
            const T *const rates = at.rate + i + first, *const drives = at.drive + i + first;
            if constexpr (kSingle) {
                advance_states<T, kTied, group>(h, at.h_pitch, A, at.A_pitch, rates, drives, b, c,
                                                sums + first);
            } else {
                T rate[group], drive[group];
#pragma GCC unroll 4
                for (int k = 0; k < group; ++k) rate[k] = rates[k], drive[k] = drives[k];
                for (std::int64_t j = 0; j < dstate; j += n)
                    advance_states<T, kTied, group>(h + j, at.h_pitch, A + j, at.A_pitch, rate,
                                                    drive, load<T>(at.B + j), load<T>(at.C + j),
                                                    sums + first);
            }
        }
        store<T>(at.y + i, sum_lanes<T>(sums));
    }
}

template <class T, bool kTied>
void advance(const Channels<T>& at, std::int64_t width, const StepShape<T>& shape) {
    if (shape.padded_dstate == kLanes<T>)
        advance<T, kTied, 4, true>(at, width, kLanes<T>);
    else if (shape.in_memory)  // fetched ahead best in the order in which states lie there
        advance<T, kTied, 1, false>(at, width, shape.padded_dstate);
    else
        advance<T, kTied, 4, false>(at, width, shape.padded_dstate);
}

template <class T>
SSM_INLINE bool is_dense(const TensorView& view, int axis) {
    return view.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && view.stride[axis] == 1;
}

/// Working memory of one task.
template <class T>
struct StepTile {
    T* x;  // [channel], like all up to skip
    T* dt;
    T* z;  // silu(z)
    T* rate;
    T* drive;
    T* y;
    T* bias;
    T* skip;
    T* B;  // [state]
    T* C;  // [state]
    T* h;  // [channel][state]
    T* A;  // [channel][state]

    static std::int64_t elements(const StepShape<T>& shape) {
        return 8 * shape.channels + 2 * (1 + shape.channels) * shape.padded_dstate;
    }
    StepTile(T* memory, const StepShape<T>& shape) {
        T** const lines[] = {&x, &dt, &z, &rate, &drive, &y, &bias, &skip};
        for (T** line : lines) {
            *line = memory;
            memory += shape.channels;
        }
        B = memory;
        C = B + shape.padded_dstate;
        h = C + shape.padded_dstate;
        A = h + shape.channels * shape.padded_dstate;
    }
};

/// Some channels of one head of one batch row.
template <class T>
struct StepBlock {
    const SelectiveStateStepArgs& args;
    const StepShape<T>& shape;
    const StepTile<T>& tile;
    std::int64_t row;
    std::int64_t head;
    std::int64_t channel;
    std::int64_t width;
    bool whole;  // the width is whole vectors

    /// Values of the block's channels as a row of T, in place where they are that already. Lanes
    /// beyond the width are 0.
    const T* channels(const TensorView& view, std::int64_t base, int axis, T* line) const {
        const std::int64_t stride = view.stride[axis], offset = base + channel * stride;
        if (whole && is_dense<T>(view, axis)) return static_cast<const T*>(view.data) + offset;
        const std::int64_t count = stride == 0 ? 1 : width;
        load_tile(line, 0, plane_at(view, offset, 0, stride), 1, count);
        for (std::int64_t i = count; i < width; ++i) line[i] = line[0];
        for (std::int64_t i = width; i < (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>; ++i)
            line[i] = T(0);
        return line;
    }
    const T* activations(const TensorView& view, std::int64_t token, T* line) const {
        return channels(view, row * view.stride[0] + token * view.stride[1] + head * view.stride[2],
                        3, line);
    }
    const T* weights(const TensorView& view, T* line) const {
        return channels(view, head * view.stride[0], 1, line);
    }
    /// B or C at one token, padded with zeros to whole vectors.
    const T* matrix(const TensorView& view, std::int64_t token, T* line) const {
        const std::int64_t group = head / (shape.heads / view.shape[2]);
        const std::int64_t offset =
            row * view.stride[0] + token * view.stride[1] + group * view.stride[2];
        if (shape.dstate == shape.padded_dstate && is_dense<T>(view, 3))
            return static_cast<const T*>(view.data) + offset;
        load_tile(line, 0, plane_at(view, offset, 0, view.stride[3]), 1, shape.dstate);
        for (std::int64_t i = shape.dstate; i < shape.padded_dstate; ++i) line[i] = T(0);
        return line;
    }
    /// State rows or A rows of the block in the tile, padded with zeros.
    void load_square(const TensorView& view, std::int64_t base, int axis, T* to) const {
        const std::int64_t pitch = shape.padded_dstate;
        if (!whole || shape.dstate != pitch)
            std::memset(to, 0, sizeof(T) * static_cast<std::size_t>(shape.channels * pitch));
        load_tile(to, pitch,
                  plane_at(view, base + channel * view.stride[axis], view.stride[axis],
                           view.stride[axis + 1]),
                  width, shape.dstate);
    }
    bool in_place(const TensorView& view, int axis) const {
        return whole && shape.dstate == shape.padded_dstate && is_dense<T>(view, axis);
    }
};

template <class T>
void write_zeros(const StepBlock<T>& block) {
    const TensorView& y = block.args.y;
    std::memset(block.tile.y, 0, sizeof(T) * static_cast<std::size_t>(block.width));
    for (std::int64_t token = 0; token < block.shape.tokens; ++token)
        store_tile(plane_at(y,
                            block.row * y.stride[0] + token * y.stride[1] +
                                block.head * y.stride[2] + block.channel * y.stride[3],
                            0, y.stride[3]),
                   block.tile.y, 0, 1, block.width);
}

/// Calls at.operator()<kCount>(i) for the vectors of a row, four of them together as far as there
/// are so many: one after the other they would wait for a function's chain of operations.
template <class T, class At>
SSM_INLINE void for_vectors(std::int64_t width, const At& at) {
    constexpr std::int64_t n = kLanes<T>;
    std::int64_t i = 0;
    for (; i + 3 * n < width; i += 4 * n) at.template operator()<4>(i);
    for (; i < width; i += n) at.template operator()<1>(i);
}

/// Step sizes of one token: rate and drive of every channel.
template <class T>
void prepare(const StepBlock<T>& block, const T* x, const T* dt, const T* bias, const T* rate_of,
             T* rate, T* drive) {
    constexpr std::int64_t n = kLanes<T>;
    const SelectiveStateStepArgs& args = block.args;
    const auto compute = [&]<int kCount>(std::int64_t at) __attribute__((always_inline)) {
        Vec<T> size[kCount], factor[kCount];
        for (int i = 0; i < kCount; ++i) {
            size[i] = load<T>(dt + at + i * n);
            if (bias != nullptr) size[i] += load<T>(bias + at + i * n);
        }
        if (args.softplus) softplus<T, kCount>(size);
        for (int i = 0; i < kCount; ++i) {
            factor[i] = size[i] * kLog2e<T>;
            if (rate_of != nullptr) factor[i] *= load<T>(rate_of + at + i * n);
        }
        if (rate_of != nullptr) exp2<kCount>(factor);
        for (int i = 0; i < kCount; ++i) {
            store<T>(rate + at + i * n, factor[i]);
            store<T>(drive + at + i * n, size[i] * load<T>(x + at + i * n));
        }
        return size[0];
    };
    const bool per_head = args.dt.stride[3] == 0 &&
                          (bias == nullptr || args.dt_bias.stride[1] == 0) &&
                          (rate_of == nullptr || args.A.stride[1] == 0);
    if (!per_head) return for_vectors<T>(block.width, compute);
    const Vec<T> size = compute.template operator()<1>(0), factor = load<T>(rate);
    for (std::int64_t i = n; i < block.width; i += n) {
        store<T>(rate + i, factor);
        store<T>(drive + i, size * load<T>(x + i));
    }
}

/// weight = silu(z).
template <class T>
void gate(T* weight, const T* z, std::int64_t width) {
    constexpr std::int64_t n = kLanes<T>;
    for_vectors<T>(width, [&]<int kCount>(std::int64_t at) __attribute__((always_inline)) {
        Pack<T, kCount> x;
        SSM_EACH(i) x.v[i] = load<T>(z + at + i * n);
        x = silu(x);
        SSM_EACH(i) store<T>(weight + at + i * n, x.v[i]);
    });
}

template <class T>
void step_block(const StepBlock<T>& block, std::int64_t state_row) {
    const SelectiveStateStepArgs& args = block.args;
    const StepShape<T>& shape = block.shape;
    const StepTile<T>& tile = block.tile;
    constexpr std::int64_t n = kLanes<T>;
    const T* const bias = args.dt_bias.ndim >= 0 ? block.weights(args.dt_bias, tile.bias) : nullptr;
    const T* const skip = args.D.ndim >= 0 ? block.weights(args.D, tile.skip) : nullptr;

    const std::int64_t A_base = block.head * args.A.stride[0];
    const T* A = tile.A;
    std::int64_t A_pitch = shape.padded_dstate;
    const T* rate_of = nullptr;
    if (shape.tied) {
        rate_of = block.channels(args.A, A_base, 1, tile.A);
    } else if (block.in_place(args.A, 2)) {
        A_pitch = args.A.stride[1];
        A = static_cast<const T*>(args.A.data) + A_base + block.channel * A_pitch;
    } else {
        block.load_square(args.A, A_base, 1, tile.A);
    }

    const std::int64_t h_base =
        state_row * args.state.stride[0] + block.head * args.state.stride[1];
    const bool in_place = block.in_place(args.state, 3);
    const std::int64_t h_pitch = in_place ? args.state.stride[2] : shape.padded_dstate;
    T* const h =
        in_place ? static_cast<T*>(args.state.data) + h_base + block.channel * h_pitch : tile.h;
    if (!in_place) block.load_square(args.state, h_base, 2, tile.h);

    const bool is_gated = args.z.ndim >= 0, y_in_place = block.whole && is_dense<T>(args.y, 3);
    for (std::int64_t token = 0; token < shape.tokens; ++token) {
        const T* const x = block.activations(args.x, token, tile.x);
        prepare(block, x, block.activations(args.dt, token, tile.dt), bias, rate_of, tile.rate,
                tile.drive);
        const T* const B = block.matrix(args.B, token, tile.B);
        const T* const C = block.matrix(args.C, token, tile.C);
        const std::int64_t y_base = block.row * args.y.stride[0] + token * args.y.stride[1] +
                                    block.head * args.y.stride[2] +
                                    block.channel * args.y.stride[3];
        T* const y = y_in_place ? static_cast<T*>(args.y.data) + y_base : tile.y;
        const Channels<T> at{h, h_pitch, A, A_pitch, tile.rate, tile.drive, B, C, y};
        if (shape.tied)
            advance<T, true>(at, block.width, shape);
        else
            advance<T, false>(at, block.width, shape);
        if (is_gated) gate(tile.z, block.activations(args.z, token, tile.z), block.width);
        for (std::int64_t i = 0; i < block.width; i += n) {
            Vec<T> sum = load<T>(y + i);
            if (skip != nullptr) sum += load<T>(skip + i) * load<T>(x + i);
            if (is_gated) sum *= load<T>(tile.z + i);
            store<T>(y + i, sum);
        }
        if (!y_in_place)
            store_tile(plane_at(args.y, y_base, 0, args.y.stride[3]), y, 0, 1, block.width);
    }
    if (!in_place)
        store_tile(plane_at(args.state, h_base + block.channel * args.state.stride[2],
                            args.state.stride[2], args.state.stride[3]),
                   tile.h, shape.padded_dstate, block.width, shape.dstate);
}

template <class T>
void step_rows(const SelectiveStateStepArgs& args, int wanted_threads) {
    const StepShape<T> shape(args);
    const int threads = shape.advanced() <= kSerialStates ? 1 : wanted_threads;
    const std::int64_t elements = StepTile<T>::elements(shape);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(elements * threads));
    const auto step = [&](std::int64_t task, int thread) {
        const StepTile<T> tile(static_cast<T*>(scratch.data()) + elements * thread, shape);
        const std::int64_t row = task / (shape.heads * shape.blocks);
        const std::int64_t channel = task % shape.blocks * shape.channels;
        const std::int64_t width = min(shape.channels, shape.headdim - channel);
        const StepBlock<T> block{args,
                                 shape,
                                 tile,
                                 row,
                                 task / shape.blocks % shape.heads,
                                 channel,
                                 width,
                                 width % kLanes<T> == 0};
        const std::int64_t state_row =
            args.state_indices.ndim < 0
                ? row
                : static_cast<const std::int32_t*>(
                      args.state_indices.data)[row * args.state_indices.stride[0]];
        if (state_row < 0)
            write_zeros(block);
        else
            step_block(block, state_row);
    };
    const std::int64_t tasks = shape.batch * shape.heads * shape.blocks;
    parallel_for(tasks, threads, step, shape.held() > kOwnStates ? WhenDone::help : WhenDone::wait);
}

}  // namespace

void selective_state_step_fwd(const SelectiveStateStepArgs& args, int threads) {
    if (args.x.dtype == DType::f64)
        step_rows<double>(args, threads);
    else
        step_rows<float>(args, threads);
}

}  // namespace ssm::cpu::SSM_ISA
