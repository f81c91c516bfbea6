// What the forward and the backward of the state-space dual scan share: states, the inputs of a
// chunk, step sizes, decays and outputs.
#pragma once

#include "ssd_chunk_scan_group.h"
#include "step_size.h"

namespace ssm::cpu::SSM_ISA {

/// A state in the order of the kernels, [panel][state][lane of the panel]. Lanes beyond the head's
/// channels must be zero before. Some rows at a time, so that memory is read in order.
template <class T>
void load_state(T* state, const SsdShape& shape, const Plane& plane) {
    constexpr std::int64_t kRows = 32;
    for (std::int64_t n = 0; n < shape.dstate; n += kRows)
        for (std::int64_t p = 0; p < shape.headdim; p += kPanel<T>) {
            Plane part = plane;
            part.data = static_cast<char*>(plane.data) +
                        (n * plane.row_stride + p * plane.column_stride) * dtype_bytes(plane.dtype);
            load_tile(state + p * shape.dstate + n * kPanel<T>, kPanel<T>, part,
                      min(kRows, shape.dstate - n), min(kPanel<T>, shape.headdim - p));
        }
}

/// Panel after panel: stores gain nothing from the order of memory.
template <class T>
void store_state(Plane plane, const T* state, const SsdShape& shape) {
    const std::int64_t bytes = dtype_bytes(plane.dtype) * plane.column_stride * kPanel<T>;
    for (std::int64_t p = 0; p < shape.headdim; p += kPanel<T>) {
        store_tile(plane, state + p * shape.dstate, kPanel<T>, shape.dstate,
                   min(kPanel<T>, shape.headdim - p));
        plane.data = static_cast<char*>(plane.data) + bytes;
    }
}

/// What is read and written next, asked for a few lines at a time into the second-level cache: rows
/// of steps may lie pages apart, which the processor does not foresee, and all of them at once
/// would wait for each other.
struct Ahead {
    Stripes stripes[8];  // five tensors of heads, two of groups, a checkpoint
    int count = 0;
    std::int64_t times;     // that `request` is called
    std::int64_t pace = 0;  // of each of them per call
    std::int64_t next = 0, end = 0;

    explicit Ahead(std::int64_t times) : times(times) {}

    SSM_INLINE void add(Ahead& ahead, const Stripes& more) {
        ahead.stripes[ahead.count++] = more;
        ahead.end = max(ahead.end, more.count);
        ahead.pace = (ahead.end + ahead.times - 1) / ahead.times;
    }

    SSM_INLINE void request(Ahead& ahead) {
        const std::int64_t end = min(ahead.next + ahead.pace, ahead.end);
        for (; ahead.next < end; ++ahead.next)
            for (int i = 0; i < ahead.count; ++i) request_stripe(ahead.stripes[i], ahead.next);
    }
};

/// What is computed after head h of a block in the chunk at `now`: the next head there, or in the
/// chunk at `then` the first head, if there is such a chunk. `views` are of heads, `group_views` of
/// their group. Asked for while the state advances; what is asked for earlier may be gone again.
template <class T, std::size_t kViews, std::size_t kGroupViews>
Ahead look_ahead(const SsdShape& shape, const HeadBlock& block, std::int64_t h, std::int64_t now,
                 std::int64_t then, const TensorView* const (&views)[kViews],
                 const TensorView* const (&group_views)[kGroupViews]) {
    const std::int64_t row_blocks = (shape.dstate + kBlockRows - 1) / kBlockRows;
    Ahead ahead(shape.padded_headdim / kPanel<T> * row_blocks);
    const bool is_last = h + 1 == block.count;
    const std::int64_t begin = is_last ? then : now, head = block.first + (is_last ? 0 : h + 1);
    if (begin < 0 || begin >= shape.seqlen || ahead.times == 0) return ahead;
    const std::int64_t steps = min(kChunk, shape.seqlen - begin);
    for (const TensorView* view : views)
        if (view->ndim >= 0)
            Ahead::add(ahead, {steps_plane(*view, block.row, head, begin), steps, shape.headdim});
    if (is_last)
        for (const TensorView* view : group_views)
            Ahead::add(ahead, {steps_plane(*view, block.row, group_of(shape, *view, head), begin),
                               steps, shape.dstate});
    return ahead;
}

/// Whether a sequence starts from nothing.
SSM_INLINE bool enters_empty(const SsdChunkScanArgs& args, const Run& run) {
    return run.state_in == Run::kZero || args.initial_states.ndim < 0;
}

/// The state with which a sequence starts.
template <class T>
void enter(T* state, const SsdChunkScanArgs& args, const SsdShape& shape, const Run& run,
           std::int64_t head) {
    if (enters_empty(args, run))
        clear(state, shape.state_elements());
    else
        load_state(state, shape, state_plane(args.initial_states, run.state_in, head));
}

/// What belongs to the heads of a block: one value each, D one per channel.
template <class T>
struct HeadParameters {
    T* rate;  // [head]           A log2(e)
    T* bias;  // [head]
    T* skip;  // [head][channel]  D

    static std::int64_t elements(const SsdShape& shape) {
        return shape.most_heads() * (2 + shape.padded_headdim);
    }

    HeadParameters(T* memory, const SsdShape& shape)
        : rate(memory), bias(rate + shape.most_heads()), skip(bias + shape.most_heads()) {}

    void load(const SsdChunkScanArgs& args, const SsdShape& shape, const HeadBlock& block) const {
        const auto values = [&](const TensorView& view) {
            return plane_at(view, block.first * view.stride[0], 0, view.stride[0]);
        };
        load_tile(rate, 0, values(args.A), 1, block.count);
        for (std::int64_t h = 0; h < block.count; ++h) rate[h] *= kLog2e<T>;
        if (args.dt_bias.ndim >= 0) load_tile(bias, 0, values(args.dt_bias), 1, block.count);
        if (args.D.ndim >= 0)
            load_tile(skip, shape.padded_headdim,
                      plane_at(args.D, block.first * args.D.stride[0], args.D.stride[0],
                               args.D.ndim == 2 ? args.D.stride[1] : 0),
                      block.count, shape.headdim);
    }
};

/// to = from with row t times weight[t]; both are [step][channel].
template <class T>
void scale_steps(T* to, const T* from, const T* weight, std::int64_t pitch, std::int64_t steps) {
    for (std::int64_t t = 0; t < steps; ++t)
        for (std::int64_t p = t * pitch; p < (t + 1) * pitch; p += kLanes<T>)
            store<T>(to + p, load<T>(from + p) * weight[t]);
}

/// X = the steps of a piece, wX = the same times weight[t]; both are [step][channel].
template <class T>
void load_scaled(T* X, T* wX, const T* weight, const SsdShape& shape, const Plane& plane,
                 std::int64_t steps) {
    const std::int64_t pitch = shape.padded_headdim;
    if (shape.headdim < pitch || !is_dense<T>(plane, pitch)) {
        load_tile(X, pitch, plane, steps, shape.headdim);
        scale_steps(wX, X, weight, pitch, steps);
        return;
    }
    const T* from = static_cast<const T*>(plane.data);
    for (std::int64_t t = 0; t < steps; ++t, from += plane.row_stride)
        for (std::int64_t p = 0; p < pitch; p += kLanes<T>) {
            const Vec<T> x = load<T>(from + p);
            store<T>(X + t * pitch + p, x);
            store<T>(wX + t * pitch + p, x * weight[t]);
        }
}

/// to = decay * from + B^T V for the steps of a segment; V is [step][channel], and both states may
/// be the same. Asks for a part of `ahead` before each block of rows, and calls visit(rows, place)
/// with these as they are before.
template <class T, class Visit>
void advance_state(T* to, const T* from, const SsdShape& shape, const T* B, const T* V, T decay,
                   std::int64_t steps, Ahead& ahead, const Visit& visit) {
    const std::int64_t pitch = shape.padded_headdim;
    for (std::int64_t p = 0; p < pitch; p += kPanel<T>)
        for_row_blocks(shape.dstate, [&]<int R>(std::int64_t n) {
            Ahead::request(ahead);
            const std::int64_t place = p * shape.dstate + n * kPanel<T>;
            Block<T, R> h;
            Block<T, R>::load_from(h, from + place, kPanel<T>);
            visit(h, place);
            Block<T, R>::scale(h, decay);
            Block<T, R>::multiply_add(h, B + n, 1, shape.dstate, V + p, pitch, steps);
            Block<T, R>::store_to(to + place, kPanel<T>, h);
        });
}
template <class T>
void advance_state(T* to, const T* from, const SsdShape& shape, const T* B, const T* V, T decay,
                   std::int64_t steps, Ahead& ahead) {
    advance_state(to, from, shape, B, V, decay, steps, ahead, [](const auto&, std::int64_t) {});
}

/// Step sizes of the heads of a block in a segment, and the logarithms of their decays.
template <class T>
struct StepSizes {
    T* raw;    // [head][step]  dt + dt_bias
    T* size;   // [head][step]  0 beyond the segment
    T* decay;  // [head][step]  log2 of a step's decay

    static std::int64_t elements(const SsdShape& shape) { return 3 * shape.most_heads() * kChunk; }

    StepSizes(T* memory, const SsdShape& shape)
        : raw(memory),
          size(raw + shape.most_heads() * kChunk),
          decay(size + shape.most_heads() * kChunk) {}

    void load_from(const SsdChunkScanArgs& args, const HeadParameters<T>& heads,
                   const HeadBlock& block, const Segment& segment) const {
        Segment::for_pieces(segment, [&](std::int64_t at, std::int64_t t, std::int64_t count) {
            load_tile(raw + at, kChunk, sizes_plane(args.dt, block.row, block.first, t),
                      block.count, count);
        });
        const T low = static_cast<T>(args.dt_low), high = static_cast<T>(args.dt_high);
        const T steps = static_cast<T>(segment.steps);
        for (std::int64_t h = 0; h < block.count; ++h)
            for (std::int64_t i = 0; i < kChunk; i += kLanes<T>) {
                T* const place = raw + h * kChunk + i;
                const Vec<T> x = load<T>(place) + heads.bias[h];
                const Vec<T> s = step_size<T>(x, args.softplus, low, high);
                const auto inside = lane_numbers<T>(i) < steps;
                store<T>(place, x);
                store<T>(size + h * kChunk + i, inside ? s : zero<T>());
                store<T>(decay + h * kChunk + i, inside ? s * heads.rate[h] : zero<T>());
            }
    }
};

/// Decays of one head between the steps of a segment and its ends.
template <class T>
struct EndDecays {
    T into[kChunk];    // from the state that enters to the step, the step's own decay included
    T out_of[kChunk];  // from the step to the state that leaves; 1 for the last step

    /// The sums are made term by term from either end: no difference of two sums, which cancels.
    void compute(const T* decay, std::int64_t steps) {
        T sum = 0;
        for (std::int64_t t = 0; t < kChunk; ++t) into[t] = sum += decay[t];
        sum = 0;
        for (std::int64_t t = kChunk; t-- > 0;) {
            out_of[t] = sum;
            sum += decay[t];
        }
        for (std::int64_t t = 0; t < kChunk; t += kLanes<T>) {
            store<T>(into + t, decay_of<T>(load<T>(into + t)));
            store<T>(out_of + t, decay_of<T>(load<T>(out_of + t)));
        }
        total = into[steps - 1];
    }
    T total;  // from the state that enters to the state that leaves
};

/// Calls body(j, i, past, decay) for j from the last step down and for the vectors i of steps that
/// end behind j: `decay` holds the decays from step j to the steps of the vector, `past` says which
/// of these are in the segment and not before j; elsewhere the decay means nothing.
template <class T, class Body>
SSM_INLINE void for_decays(const T* decay, std::int64_t steps, const Body& body) {
    constexpr int kVectors = kChunk / kLanes<T>;
    const T end = static_cast<T>(steps);
    Vec<T> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = zero<T>();
    for (std::int64_t j = steps; j-- > 0;) {
        const T here = static_cast<T>(j), next = j + 1 < steps ? decay[j + 1] : T(0);
        for (int v = static_cast<int>(j / kLanes<T>); v < kVectors; ++v) {
            const Vec<T> lane = lane_numbers<T>(v * kLanes<T>);
            // From j + 1 to j: one term more for all that lies behind; nothing for j itself.
            sums[v] = lane > here ? sums[v] + next : zero<T>();
            body(j, v * kLanes<T>, (lane >= here) & (lane < end), decay_of<T>(sums[v]));
        }
    }
}

/// mix[j][i] = C_i . B_j exp(decay from j to i) s_j for i from j on; what lies before is not read.
template <class T>
void mix_steps(T* mix, const T* CB, const T* size, const T* decay, std::int64_t steps) {
    for_decays<T>(decay, steps, [&](std::int64_t j, std::int64_t i, auto, Vec<T> between) {
        const std::int64_t at = j * kChunk + i;
        store<T>(mix + at, load<T>(CB + at) * between * size[j]);
    });
}

/// y = exp(decay from the start) C h + mix X + D X, times silu(z) unless z is null, for all
/// channels of a head; mix is [j][i], and a null state is one of zeros.
template <class T>
void write_outputs(Rows<T> y, const SsdShape& shape, const GroupTile<T>& group, const T* state,
                   const T* mix, const T* X, const T* skip, const EndDecays<T>& ends,
                   Rows<const T> z, std::int64_t steps) {
    const std::int64_t pitch = shape.padded_headdim;
    const std::int64_t states = state == nullptr ? 0 : shape.dstate;
    for (std::int64_t p = 0; p < pitch; p += kPanel<T>)
        for_row_blocks(steps, [&]<int R>(std::int64_t i) {
            Block<T, R> rows;
            Block<T, R>::clear(rows);
            Block<T, R>::multiply_add(rows, group.C + i * shape.dstate, shape.dstate, 1,
                                      state + p * states, kPanel<T>, states);
            Block<T, R>::scale_rows(rows, ends.into + i);
            Block<T, R>::multiply_add(rows, mix + i, 1, kChunk, X + p, pitch, i);
            Block<T, R>::multiply_add_lower(rows, mix + i * kChunk + i, 1, kChunk,
                                            X + i * pitch + p, pitch);
            Block<T, R>::add_product(rows, skip + p, X + i * pitch + p, pitch);
            if (z.data != nullptr) Block<T, R>::gate(rows, z.data + i * z.pitch + p, z.pitch);
            Block<T, R>::store_to(y.data + i * y.pitch + p, y.pitch, rows);
        });
}

}  // namespace ssm::cpu::SSM_ISA
