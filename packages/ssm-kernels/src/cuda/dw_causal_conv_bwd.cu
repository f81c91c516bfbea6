// The backward of the causal convolution on the device. The gradients before the activation are
// computed again from the inputs and kept in the workspace; dx gathers them, the parts of dweight
// and dbias are summed over stretches of steps and then in a fixed order.
#include "dw_causal_conv_tile.cuh"
#include "kernels.h"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "dw_causal_conv";
constexpr int kLanes = 32;
constexpr int kTaps = 4;  // of dweight that are summed at a time
/// Blocks that fill a GPU. With fewer, a part of the sums has fewer steps.
constexpr std::int64_t kFullDevice = 528;
constexpr std::int64_t kMostSteps = 2048, kLeastSteps = 64;

/// What the kernels of the backward read and write besides the inputs.
template <class Real>
struct Gradients {
    Plane<3> dy, dx;                        // (B, D, L)
    Plane<3> dfinal_state, dinitial_state;  // (S, D, W - 1)
    Plane<2> dweight;                       // (D, W)
    Plane<1> dbias;                         // (D)
    Real* before;                           // (B, D, L) or (B, L, D), as x lies
    Real* parts;                            // (parts, W + 1, D): of dweight, then of dbias

    static SSM_DEVICE std::int64_t place(const ConvInputs& in, std::int64_t row,
                                         std::int64_t channel, std::int64_t step) {
        return in.along_steps ? (row * in.dim + channel) * in.seqlen + step
                              : (row * in.seqlen + step) * in.dim + channel;
    }
    SSM_DEVICE Real final_gradient(std::int64_t state, std::int64_t channel,
                                   std::int64_t place) const {
        if (!dfinal_state) return 0;
        return dfinal_state.template load<Real>(
            ConvInputs::offset(dfinal_state, state, channel, place));
    }
};

/// The gradient before the activation.
template <class Real>
struct BeforeActivation {
    Gradients<Real> out;

    SSM_DEVICE void operator()(const ConvInputs& in, const ConvElement& at) const {
        Real value = 0;
        if (in.sequence_at(at.row, at.step) >= 0) {
            value = out.dy.template load<Real>(in.offset(out.dy, at.row, at.channel, at.step));
            if (in.silu) {
                const Real sum = in.template filter<Real>(at.row, at.channel, at.step);
                value *= silu_slope(sum, sigmoid(sum));
            }
        }
        out.before[out.place(in, at.row, at.channel, at.step)] = value;
    }
};

/// sum_k weight_k g over the steps from `step` on that see an input, which is tap `last` of the
/// first of them; and what the final state gives back to an input that is still in it.
template <class Real>
SSM_DEVICE Real gather(const ConvInputs& in, const Gradients<Real>& out, std::int64_t row,
                       std::int64_t channel, std::int64_t step, std::int64_t last) {
    const std::int32_t sequence = in.sequence_at(row, step);
    Real sum = 0;
    for (std::int64_t k = last;; --k) {
        sum = fma_of(in.template tap<Real>(channel, k),
                     out.before[out.place(in, row, channel, step)], sum);
        if (k == 0) return sum;
        step = in.step_after(row, step);
        const bool ends = step == in.seqlen;
        if (!ends && in.sequence_at(row, step) == sequence) continue;
        if (ends || in.state_per_sequence)
            sum += out.final_gradient(in.state_of(row, sequence), channel, k - 1);
        return sum;
    }
}

template <class Real>
struct InputGradient {
    Gradients<Real> out;

    SSM_DEVICE void operator()(const ConvInputs& in, const ConvElement& at) const {
        const bool skipped = in.sequence_at(at.row, at.step) < 0;
        out.dx.store(
            in.offset(out.dx, at.row, at.channel, at.step),
            skipped ? Real(0) : gather(in, out, at.row, at.channel, at.step, in.width - 1));
    }
};

/// The initial state is input before the first step of its sequence.
template <class Real>
struct InitialGradient {
    Gradients<Real> out;

    SSM_DEVICE void operator()(const ConvInputs& in, std::int64_t row, std::int64_t step,
                               std::int64_t channel) const {
        const std::int64_t state = in.state_of(row, in.sequence_at(row, step));
        for (std::int64_t place = 0; place < in.width - 1; ++place)
            out.dinitial_state.store(in.offset(out.dinitial_state, state, channel, place),
                                     gather(in, out, row, channel, step, place));
    }
};

/// How the sums over all steps are cut: a part is a stretch of (row, step).
struct Parts {
    std::int64_t tiles;         // blocks along channels
    std::int64_t steps, count;  // of a part, and of parts

    explicit Parts(const ConvInputs& in)
        : tiles(in.along_steps ? (in.dim + kConvThreads / kLanes - 1) / (kConvThreads / kLanes)
                               : conv_blocks(in.dim)) {
        for (steps = kMostSteps;; steps /= 2) {
            count = (in.batch * in.seqlen + steps - 1) / steps;
            if (count * tiles >= kFullDevice || steps == kLeastSteps) break;
        }
    }
};

/// One part of dweight and dbias. A channel has a thread, or, where its steps are neighbours in
/// memory, a warp.
template <class Real>
struct SumParts {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    struct Registers {
        Real sums[kTaps], bias;
    };

    ConvInputs in;
    Gradients<Real> out;
    Parts parts;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const int lanes = in.along_steps ? kLanes : 1;
        const std::int64_t part = quotient(index, parts.tiles);
        const std::int64_t first_channel = (index - part * parts.tiles) * (kThreads / lanes);
        for (std::int64_t first = 0; first < in.width; first += kTaps) {
            block.each([&](int thread, Registers& r) {
                add(part, first_channel + thread / lanes, first, thread % lanes, lanes, r);
            });
            SSM_UNROLL
            for (int i = 0; i < kTaps; ++i)
                block.sum_lanes(lanes, [i](Registers& r) -> Real& { return r.sums[i]; });
            block.sum_lanes(lanes, [](Registers& r) -> Real& { return r.bias; });
            block.each([&](int thread, Registers& r) {
                const std::int64_t channel = first_channel + thread / lanes;
                if (channel >= in.dim || thread % lanes != 0) return;
                Real* const to = out.parts + part * (in.width + 1) * in.dim + channel;
                SSM_UNROLL
                for (int i = 0; i < kTaps; ++i)
                    if (first + i < in.width) to[(first + i) * in.dim] = r.sums[i];
                if (first == 0) to[in.width * in.dim] = r.bias;
            });
        }
    }

  private:
    /// Adds the steps of one lane.
    SSM_DEVICE void add(std::int64_t part, std::int64_t channel, std::int64_t first, int lane,
                        int lanes, Registers& r) const {
        r.bias = 0;
        for (Real& sum : r.sums) sum = 0;
        if (channel >= in.dim) return;
        const std::int64_t begin = part * parts.steps, all = in.batch * in.seqlen;
        const std::int64_t end = begin + parts.steps < all ? begin + parts.steps : all;
        for (std::int64_t number = begin + lane; number < end; number += lanes) {
            const std::int64_t row = quotient(number, in.seqlen);
            const std::int64_t step = number - row * in.seqlen;
            const std::int32_t sequence = in.sequence_at(row, step);
            if (sequence < 0) continue;
            const Real gradient = out.before[out.place(in, row, channel, step)];
            const auto add_tap = [&](std::int64_t k, Real input) {
                SSM_UNROLL
                for (int i = 0; i < kTaps; ++i)
                    if (k == first + i) r.sums[i] = fma_of(gradient, input, r.sums[i]);
            };
            r.bias += gradient;
            // From the newest input to the oldest one of these taps.
            const Reach from = in.reach(row, step, sequence);
            std::int64_t k = in.width - 1;
            for (std::int64_t s = step; k >= first && k >= in.width - 1 - from.have; --k) {
                add_tap(k, in.template input<Real>(row, channel, s));
                if (k > in.width - 1 - from.have) s = in.step_before(row, s);
            }
            for (; k >= first; --k)
                add_tap(k, in.template remembered<Real>(from.state, channel, from.have + k));
        }
    }
};

/// A thread walks some steps of four channels, and on until what it owes to them is complete.
template <class Memory, class Real>
struct ChannelFours {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 3;
    static constexpr int kAhead = 4;  // steps whose inputs are under way at a time
    static constexpr std::int64_t kMostSteps = 128, kLeastSteps = 32;
    struct Registers {
        Real sums[kConvTaps][4], bias[4];  // of dweight and dbias
    };

    ConvInputs in;
    Gradients<Real> out;
    std::int64_t tiles;                    // blocks along channels
    std::int64_t step_parts, steps, rows;  // blocks along steps; steps and rows of a block

    ChannelFours(const ConvInputs& inputs, const Gradients<Real>& gradients)
        : in(inputs), out(gradients), tiles(conv_blocks(in.dim / 4)) {
        for (steps = kMostSteps;; steps /= 2) {
            step_parts = (in.seqlen + steps - 1) / steps;
            // Short rows share a part: the parts should not outweigh the rows.
            rows = in.seqlen > 0 && in.seqlen < steps ? steps / in.seqlen : 1;
            if (parts() * tiles >= kFullDevice || steps == kLeastSteps) break;
        }
    }
    std::int64_t parts() const { return (in.batch + rows - 1) / rows * step_parts; }
    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers& r) {
            const std::int64_t part = quotient(index, tiles), group = quotient(part, step_parts);
            const std::int64_t channel = ((index - part * tiles) * kThreads + thread) * 4;
            if (channel >= in.dim) return;
            SSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                r.bias[c] = 0;
                SSM_UNROLL
                for (int k = 0; k < kConvTaps; ++k) r.sums[k][c] = 0;
            }
            for (std::int64_t row = group * rows; row < (group + 1) * rows && row < in.batch; ++row)
                walk(row, channel, (part - group * step_parts) * steps, r);
            Real* to = out.parts + part * (in.width + 1) * in.dim + channel;
            SSM_UNROLL
            for (int k = 0; k < kConvTaps; ++k) {
                if (k < kConvTaps - in.width) continue;
                SSM_UNROLL
                for (int c = 0; c < 4; ++c) to[c] = r.sums[k][c];
                to += in.dim;
            }
            SSM_UNROLL
            for (int c = 0; c < 4; ++c) to[c] = r.bias[c];
        });
    }

  private:
    /// Where the gradient of an input goes: a step after the first one of the part, nowhere, or
    /// -2 - place for a place in the initial state.
    static constexpr int kNowhere = -1;

    /// The inputs that the filter sees, and what has been summed for each of them.
    struct Adjoint {
        Walk<Real, 4> inputs;
        Real sums[kConvTaps][4];
        int to[kConvTaps];
        std::int64_t row, channel, begin, end;

        SSM_DEVICE bool owes() const {
            bool any = false;
            SSM_UNROLL
            for (int k = 1; k < kConvTaps; ++k) any = any || to[k] != kNowhere;
            return any;
        }
    };

    SSM_DEVICE void walk(std::int64_t row, std::int64_t channel, std::int64_t begin,
                         Registers& r) const {
        Adjoint at;
        at.row = row, at.channel = channel, at.begin = begin;
        at.end = begin + steps < in.seqlen ? begin + steps : in.seqlen;
        at.inputs.begin(in, row, channel, begin);
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k) at.to[k] = kNowhere;
        const auto load = [&](const Plane<3>& tensor, std::int64_t step) {
            return *reinterpret_cast<const Pack<Memory, 4>*>(
                static_cast<const Memory*>(tensor.data) + in.offset(tensor, row, channel, step));
        };
        SSM_ROLLED
        for (std::int64_t step = begin; step < in.seqlen && (step < at.end || at.owes());
             step += kAhead) {
            Pack<Memory, 4> x[kAhead], dy[kAhead];
            SSM_UNROLL
            for (int i = 0; i < kAhead; ++i) {
                if (step + i >= in.seqlen) continue;
                x[i] = load(in.x, step + i);
                dy[i] = load(out.dy, step + i);
            }
            SSM_UNROLL
            for (int i = 0; i < kAhead; ++i)
                if (step + i < in.seqlen && (step + i < at.end || at.owes()))
                    advance(at, step + i, x[i], dy[i], r);
        }
        finish(at, true);
    }

    SSM_DEVICE void advance(Adjoint& at, std::int64_t step, const Pack<Memory, 4>& x,
                            const Pack<Memory, 4>& dy, Registers& r) const {
        const std::int32_t next = in.sequence_at(at.row, step);
        const bool own = step < at.end;
        if (next < 0) {
            if (own) put_input(at, step, {});
            return;
        }
        if (next != at.inputs.sequence) {
            if (at.inputs.sequence >= 0) finish(at, in.state_per_sequence);
            if (!own) return;
            const bool has_state = at.inputs.change(in, at.row, at.channel, step, next);
            SSM_UNROLL
            for (int k = 1; k < kConvTaps; ++k) {
                const int place = k - at.inputs.missing - 1;
                at.to[k] = has_state && place >= 0 ? -2 - place : kNowhere;
                SSM_UNROLL
                for (int c = 0; c < 4; ++c) at.sums[k][c] = 0;
            }
        }
        Real inputs[4];
        SSM_UNROLL
        for (int c = 0; c < 4; ++c) inputs[c] = static_cast<Real>(widen(x.of[c]));
        at.inputs.take(inputs);
        SSM_UNROLL
        for (int k = 0; k + 1 < kConvTaps; ++k) at.to[k] = at.to[k + 1];
        at.to[kConvTaps - 1] = own ? static_cast<int>(step - at.begin) : kNowhere;
        SSM_UNROLL
        for (int c = 0; c < 4; ++c) {
            Real gradient = static_cast<Real>(widen(dy.of[c]));
            if (in.silu) {
                const Real sum = at.inputs.filter(c);
                gradient *= silu_slope(sum, sigmoid(sum));
            }
            SSM_UNROLL
            for (int k = 0; k + 1 < kConvTaps; ++k) at.sums[k][c] = at.sums[k + 1][c];
            at.sums[kConvTaps - 1][c] = 0;
            SSM_UNROLL
            for (int k = 0; k < kConvTaps; ++k) {
                if (k < at.inputs.missing) continue;
                at.sums[k][c] = fma_of(at.inputs.taps[k][c], gradient, at.sums[k][c]);
                if (own) r.sums[k][c] = fma_of(gradient, at.inputs.window[k][c], r.sums[k][c]);
            }
            if (own) r.bias[c] += gradient;
        }
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k)
            if (k == at.inputs.missing) put(at, k);
    }

    /// The sequence ends: its last inputs are the final state, where there is one.
    SSM_DEVICE void finish(Adjoint& at, bool has_state) const {
        const std::int64_t state = in.state_of(at.row, at.inputs.sequence);
        SSM_UNROLL
        for (int k = 1; k < kConvTaps; ++k) {
            if (at.to[k] == kNowhere || k <= at.inputs.missing) continue;
            if (has_state) {
                SSM_UNROLL
                for (int c = 0; c < 4; ++c)
                    at.sums[k][c] +=
                        out.final_gradient(state, at.channel + c, k - at.inputs.missing - 1);
            }
            put(at, k);
        }
    }

    /// Writes the gradient of an input, which is complete.
    SSM_DEVICE void put(Adjoint& at, int k) const {
        const int to = at.to[k];
        at.to[k] = kNowhere;
        if (to == kNowhere) return;
        if (to >= 0) return put_input(at, at.begin + to, at.sums[k]);
        if (!out.dinitial_state) return;
        SSM_UNROLL
        for (int c = 0; c < 4; ++c)
            out.dinitial_state.store(
                in.offset(out.dinitial_state, in.state_of(at.row, at.inputs.sequence),
                          at.channel + c, -2 - to),
                at.sums[k][c]);
    }
    SSM_DEVICE void put_input(const Adjoint& at, std::int64_t step, const Real (&sums)[4]) const {
        Pack<Memory, 4> four;
        SSM_UNROLL
        for (int c = 0; c < 4; ++c) narrow(sums[c], four.of[c]);
        *reinterpret_cast<Pack<Memory, 4>*>(static_cast<Memory*>(out.dx.data) +
                                            in.offset(out.dx, at.row, at.channel, step)) = four;
    }
};

/// The sums of all parts, in their order.
template <class Real>
struct AddParts {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    struct Registers {};

    Gradients<Real> out;
    std::int64_t dim, width, parts;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t number = index * kThreads + thread, size = (width + 1) * dim;
            if (number >= size) return;
            Real sum = 0;
            for (std::int64_t part = 0; part < parts; ++part)
                sum += out.parts[part * size + number];
            const std::int64_t k = quotient(number, dim), channel = number - k * dim;
            if (k < width)
                out.dweight.store(channel * out.dweight.stride[0] + k * out.dweight.stride[1], sum);
            else if (out.dbias)
                out.dbias.store(channel * out.dbias.stride[0], sum);
        });
    }
};

bool takes_fours(const DwCausalConvArgs& args, const DwCausalConvGrads& grads) {
    bool all = args.weight.shape[1] <= kConvTaps;
    for (const TensorView* view : {&args.x, &grads.dy, &grads.dx})
        all = all && view->dtype == args.x.dtype && in_packs(*view, 1, 4);
    return all;
}

template <class Real>
void start_strided(const ConvInputs& in, const Gradients<Real>& out, const DwCausalConvGrads& grads,
                   const Device& device, const Exec& exec) {
    const std::int64_t blocks = conv_blocks(in.elements());
    const Parts parts(in);
    launch<Real>(kOp, EachConvElement<Real, BeforeActivation<Real>>{in, {out}}, blocks, device,
                 exec);
    launch<Real>(kOp, EachConvElement<Real, InputGradient<Real>>{in, {out}}, blocks, device, exec);
    put_conv_states<Real, Edge::begin>(kOp, in, grads.dinitial_state, InitialGradient<Real>{out},
                                       device, exec);
    launch<Real>(kOp, SumParts<Real>{in, out, parts}, parts.count * parts.tiles, device, exec);
}

}  // namespace

std::int64_t dw_causal_conv_bwd_workspace(const DwCausalConvArgs& args,
                                          const DwCausalConvGrads& grads) {
    const ConvInputs in(args, 0);
    const std::int64_t size = args.x.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    const std::int64_t sums = (in.width + 1) * in.dim;
    if (takes_fours(args, grads)) return ChannelFours<float, float>(in, {}).parts() * sums * size;
    return (in.elements() + Parts(in).count * sums) * size;
}

void dw_causal_conv_bwd(const DwCausalConvArgs& args, const DwCausalConvGrads& grads,
                        std::int64_t num_states, const Exec& exec) {
    const ConvInputs in(args, num_states);
    const Device device = args.x.device;
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        Gradients<Real> out{plane<3>(grads.dy),
                            plane<3>(grads.dx),
                            plane<3>(grads.dfinal_state),
                            plane<3>(grads.dinitial_state),
                            plane<2>(grads.dweight),
                            plane<1>(grads.dbias),
                            nullptr,
                            static_cast<Real*>(exec.workspace)};
        copy_conv_states<Real>(kOp, in, grads.dfinal_state, grads.dinitial_state, device, exec);
        std::int64_t parts = Parts(in).count;
        if (takes_fours(args, grads)) {
            with_memory_type(args.x.dtype, [&](auto element) {
                const ChannelFours<decltype(element), Real> kernel(in, out);
                parts = kernel.parts();
                launch<Real>(kOp, kernel, parts * kernel.tiles, device, exec);
            });
        } else {
            out.before = out.parts + parts * (in.width + 1) * in.dim;
            start_strided(in, out, grads, device, exec);
        }
        launch<Real>(kOp, AddParts<Real>{out, in.dim, in.width, parts},
                     conv_blocks((in.width + 1) * in.dim), device, exec);
    });
}

}  // namespace ssm::cuda
