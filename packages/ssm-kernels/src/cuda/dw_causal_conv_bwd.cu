// The backward of the causal convolution on the device. Where the filter is short and memory is
// made of packs, one pass over the inputs gives all gradients. Elsewhere those before the
// activation are computed again from the inputs and kept in the workspace, and dx gathers them. The
// parts of dweight and dbias are summed over stretches of steps and then in a fixed order.
#include "dw_causal_conv_adjoint.cuh"
#include "kernels.h"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "dw_causal_conv";
constexpr int kLanes = 32;
constexpr int kTaps = 4;  // of dweight that are summed at a time
/// Blocks that fill a GPU. With fewer, a part of the sums has fewer steps.
constexpr std::int64_t kFullDevice = 528;
constexpr std::int64_t kMostSteps = 2048, kLeastSteps = 64;

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
    using Registers = ConvSums<Real, 4>;

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
            r.clear();
            for (std::int64_t row = group * rows; row < (group + 1) * rows && row < in.batch; ++row)
                walk(row, channel, (part - group * step_parts) * steps, r);
            r.put(in, out.parts + part * (in.width + 1) * in.dim + channel);
        });
    }

  private:
    SSM_DEVICE void walk(std::int64_t row, std::int64_t channel, std::int64_t begin,
                         Registers& r) const {
        const auto place = [&](const Plane<3>& tensor, std::int64_t step) {
            return static_cast<Memory*>(tensor.data) + in.offset(tensor, row, channel, step);
        };
        const auto load = [&](const Plane<3>& tensor, std::int64_t step) {
            return *reinterpret_cast<const Pack<Memory, 4>*>(place(tensor, step));
        };
        const auto put_input = [&](std::int64_t step, const Real(&sums)[4]) {
            Pack<Memory, 4> four;
            SSM_UNROLL
            for (int c = 0; c < 4; ++c) narrow(sums[c], four.of[c]);
            *reinterpret_cast<Pack<Memory, 4>*>(place(out.dx, step)) = four;
        };
        ConvAdjoint<Real, 4> at;
        at.begin(row, channel, begin, begin + steps < in.seqlen ? begin + steps : in.seqlen);
        at.inputs.begin(in, row, channel, begin);
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
                    at.advance(in, out, step + i, x[i].of, dy[i].of, r, put_input);
        }
        at.finish(in, out, true, put_input);
    }
};

/// A lane walks packs of steps of a channel, each of them on until what it owes to it is complete;
/// a warp has every 32nd pack of a stretch.
template <class Memory, class Real>
struct StepPacks {
    static constexpr int kThreads = kConvThreads;
    static constexpr int kBlocksPerUnit = 4;
    static constexpr int kPack = Pack<Memory>::kWidth;
    static constexpr std::int64_t kMostPacks = 256, kLeastPacks = kLanes;
    using Registers = ConvSums<Real, 1>;

    ConvInputs in;
    Gradients<Real> out;
    std::int64_t tiles;                        // blocks along channels
    std::int64_t row_packs, packs, parts = 0;  // packs of a row and of a part; parts

    StepPacks(const ConvInputs& inputs, const Gradients<Real>& gradients)
        : in(inputs),
          out(gradients),
          tiles((in.dim + kThreads / kLanes - 1) / (kThreads / kLanes)),
          row_packs(in.seqlen / kPack) {
        for (packs = kMostPacks;; packs /= 2) {
            parts = (in.batch * row_packs + packs - 1) / packs;
            if (parts * tiles >= kFullDevice || packs == kLeastPacks) break;
        }
    }
    /// Where the gradients of a pack are put together: the place in it is no constant.
    std::int64_t shared_size() const { return kPack * kThreads; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const std::int64_t part = quotient(index, tiles);
        const std::int64_t first_channel = (index - part * tiles) * (kThreads / kLanes);
        block.each([&](int thread, Registers& r) {
            r.clear();
            const std::int64_t channel = first_channel + thread / kLanes;
            if (channel >= in.dim) return;
            ConvAdjoint<Real, 1> at;
            at.inputs.load_filter(in, channel);
            const std::int64_t all = in.batch * row_packs;
            const std::int64_t end = (part + 1) * packs < all ? (part + 1) * packs : all;
            SSM_ROLLED
            for (std::int64_t i = part * packs + thread % kLanes; i < end; i += kLanes) {
                const std::int64_t row = quotient(i, row_packs);
                walk(block, thread, row, channel, (i - row * row_packs) * kPack, at, r);
            }
        });
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k)
            block.template sum_lanes<kLanes>([k](Registers& r) -> Real& { return r.taps[k][0]; });
        block.template sum_lanes<kLanes>([](Registers& r) -> Real& { return r.bias[0]; });
        block.each([&](int thread, Registers& r) {
            const std::int64_t channel = first_channel + thread / kLanes;
            if (channel < in.dim && thread % kLanes == 0)
                r.put(in, out.parts + part * (in.width + 1) * in.dim + channel);
        });
    }

  private:
    template <class Block>
    SSM_DEVICE void walk(Block& block, int thread, std::int64_t row, std::int64_t channel,
                         std::int64_t begin, ConvAdjoint<Real, 1>& at, Registers& r) const {
        const auto place = [&](const Plane<3>& tensor, std::int64_t step) {
            return static_cast<Memory*>(tensor.data) + in.offset(tensor, row, channel, step);
        };
        const auto put_input = [&](std::int64_t step, const Real(&sums)[1]) {
            block.write(static_cast<int>(step - begin) * kThreads + thread, sums[0]);
        };
        const auto x = *reinterpret_cast<const Pack<Memory>*>(place(in.x, begin));
        const auto dy = *reinterpret_cast<const Pack<Memory>*>(place(out.dy, begin));
        at.begin(row, channel, begin, begin + kPack);
        at.inputs.resume(in, row, channel, begin);
        SSM_UNROLL
        for (int i = 0; i < kPack; ++i)
            at.advance(in, out, begin + i, &x.of[i], &dy.of[i], r, put_input);
        SSM_ROLLED
        for (std::int64_t step = at.end; step < in.seqlen && at.owes(); ++step)
            at.advance(in, out, step, place(in.x, step), place(out.dy, step), r, put_input);
        at.finish(in, out, true, put_input);
        Pack<Memory> dx;
        SSM_UNROLL
        for (int i = 0; i < kPack; ++i) narrow(block.read(i * kThreads + thread), dx.of[i]);
        *reinterpret_cast<Pack<Memory>*>(place(out.dx, begin)) = dx;
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

/// How the backward goes: packs of channels, packs of steps, or element by element.
enum class Way { channels, steps, elements };

Way way_of(const DwCausalConvArgs& args, const DwCausalConvGrads& grads) {
    const int pack = args.x.dtype == DType::f64 ? 2 : args.x.dtype == DType::f32 ? 4 : 8;
    const auto all = [&](int axis, int width) {
        for (const TensorView* view : {&args.x, &grads.dy, &grads.dx})
            if (view->dtype != args.x.dtype || !in_packs(*view, axis, width)) return false;
        return true;
    };
    if (args.weight.shape[1] > kConvTaps) return Way::elements;
    return all(1, 4) ? Way::channels : all(2, pack) ? Way::steps : Way::elements;
}

/// Parts of the sums, where they do not depend on the compute type.
std::int64_t packed_parts(const ConvInputs& in, Way way, DType dtype) {
    std::int64_t parts = 0;
    with_memory_type(dtype, [&](auto element) {
        using Memory = decltype(element);
        parts = way == Way::channels ? ChannelFours<Memory, float>(in, {}).parts()
                                     : StepPacks<Memory, float>(in, {}).parts;
    });
    return parts;
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
    const Way way = way_of(args, grads);
    if (way != Way::elements) return packed_parts(in, way, args.x.dtype) * sums * size;
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
        const Way way = way_of(args, grads);
        std::int64_t parts = Parts(in).count;
        if (way == Way::elements) {
            out.before = out.parts + parts * (in.width + 1) * in.dim;
            start_strided(in, out, grads, device, exec);
        } else {
            parts = packed_parts(in, way, args.x.dtype);
            with_memory_type(args.x.dtype, [&](auto element) {
                using Memory = decltype(element);
                const auto start = [&](const auto& kernel) {
                    launch<Real>(kOp, kernel, parts * kernel.tiles, device, exec);
                };
                if (way == Way::channels)
                    start(ChannelFours<Memory, Real>(in, out));
                else
                    start(StepPacks<Memory, Real>(in, out));
            });
        }
        launch<Real>(kOp, AddParts<Real>{out, in.dim, in.width, parts},
                     conv_blocks((in.width + 1) * in.dim), device, exec);
    });
}

}  // namespace ssm::cuda
