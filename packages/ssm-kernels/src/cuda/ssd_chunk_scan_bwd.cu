// The backward of the state-space dual scan on the device: window by window, from the last to the
// first, chains over the tiles give the state that enters each tile and the gradient of the one
// that leaves it, and with these all tiles are independent.
#include "kernels.h"
#include "ssd_chunk_scan_gradients.cuh"
#include "ssd_chunk_scan_states.cuh"

namespace ssm::cuda {

namespace {

/// to[o] = the sum over the parts, and over `inner` neighbours, of from[part, o, neighbour].
template <class Real>
struct SumSsdParts {
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerUnit = 1;
    static constexpr int kAlong = kThreads / kWarp;
    struct Registers {};

    const Real* from;
    Plane<2> to;  // (outer, columns)
    std::int64_t parts, outputs, columns, inner;

    std::int64_t shared_size() const { return kThreads; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t output = index * kWarp + thread % kWarp;
            Real sum = 0;
            if (output < outputs)
                for (std::int64_t part = thread / kWarp; part < parts; part += kAlong)
                    for (std::int64_t i = 0; i < inner; ++i)
                        sum += from[(part * outputs + output) * inner + i];
            block.write(thread, sum);
        });
        block.barrier();
        block.each([&](int thread, Registers&) {
            const std::int64_t output = index * kWarp + thread;
            if (thread >= kWarp || output >= outputs) return;
            Real sum = 0;
            SSM_UNROLL
            for (int i = 0; i < kAlong; ++i) sum += block.read(i * kWarp + thread);
            to.store(output / columns * to.stride[0] + output % columns * to.stride[1], sum);
        });
    }
};

/// to (B, L, G, N), from `begin` on = the sum over the slices of a group of from (B, slices, steps,
/// N).
template <class Real>
struct SumSsdSlices {
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    const Real* from;
    Plane<4> to;
    std::int64_t groups, group_slices, window_steps, dstate, begin, steps, elements;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t element = index * kThreads + thread;
            if (element >= elements) return;
            const std::int64_t above = quotient(element, dstate), state = element - above * dstate;
            const std::int64_t group_row = quotient(above, steps), step = above - group_row * steps;
            const std::int64_t row = quotient(group_row, groups), group = group_row - row * groups;
            const Real* own =
                from + (group_row * group_slices * window_steps + step) * dstate + state;
            Real sum = 0;
            for (std::int64_t slice = 0; slice < group_slices; ++slice)
                sum += own[slice * window_steps * dstate];
            to.store(row * to.stride[0] + (begin + step) * to.stride[1] + group * to.stride[2] +
                         state * to.stride[3],
                     sum);
        });
    }
};

template <class Real>
void sum_ssd_parts(const Real* from, const TensorView& to, std::int64_t parts, std::int64_t outputs,
                   std::int64_t inner, const Device& device, const Exec& exec) {
    if (from == nullptr) return;
    const std::int64_t columns = to.ndim == 2 ? to.shape[1] : 1;
    const SumSsdParts<Real> kernel{from, plane<2>(to), parts, outputs, columns, inner};
    launch<Real>(kSsdOp, kernel, (outputs + kWarp - 1) / kWarp, device, exec);
}

template <class Real>
void sum_ssd_slices(const SsdInputs& in, const SsdGradients<Real>& out, const Real* from,
                    const TensorView& to, std::int64_t begin, std::int64_t steps,
                    const Device& device, const Exec& exec) {
    const std::int64_t groups = to.shape[2];
    const SumSsdSlices<Real> kernel{from,
                                    plane<4>(to),
                                    groups,
                                    out.slices / groups,
                                    out.window_steps(),
                                    in.dstate,
                                    begin,
                                    steps,
                                    in.batch * groups * steps * in.dstate};
    launch<Real>(kSsdOp, kernel, (kernel.elements + kernel.kThreads - 1) / kernel.kThreads, device,
                 exec);
}

template <class Real, class Element>
void start(const SsdInputs& in, const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
           const Exec& exec) {
    const Device device = args.X.device;
    // What a block keeps of dB and dC is what its registers and its memory have room for.
    constexpr bool is_half = sizeof(Element) == 2;
    using Wide = SsdDifferentiate<Real, Element, is_half ? 128 : 32>;
    using Slim = SsdDifferentiate<Real, Element, is_half ? 64 : 32>;
    const bool is_wide = in.dstate > 64 && shared_bytes<Real>(Wide{}) <= shared_of_block(device);
    check_room<Real>(kSsdOp, Slim{}, device);
    SsdGradients<Real> out{};
    out.dy = plane<4>(grads.dy), out.dX = plane<4>(grads.dX), out.dz = plane<4>(grads.dz);
    out.ddt = plane<3>(grads.ddt);
    out.dfinal_states = plane<4>(grads.dfinal_states);
    out.dinitial_states = plane<4>(grads.dinitial_states);
    out.copies_dy = grads.dy.dtype == args.X.dtype && in_packs(grads.dy, 3, 16 / sizeof(Element));
    out.packed_dX = in_packs(grads.dX, 3, 2);
    out.packed_dz = in.z && in_packs(grads.dz, 3, 2);
    SsdWorkspace<Real>{static_cast<char*>(exec.workspace)}.template lay_out<Element>(in, out);

    if (out.before != nullptr)
        launch<Real>(kSsdOp, SsdMarkTiles<Real>{in, out.before, out.tiles}, in.batch, device, exec);
    if (in.state_per_sequence && out.dinitial_states)
        copy_ssd_states<Real>(in, out.dfinal_states, out.dinitial_states, device, exec);
    SsdStates<Real, Element> states{in, out, 0, true};
    for (states.window = 0; states.window + 1 < out.windows; ++states.window)
        launch<Real>(kSsdOp, states, states.blocks(), device, exec);
    states.only_enters = false;
    for (std::int64_t window = out.windows - 1; window >= 0; --window) {
        states.window = window;
        launch<Real>(kSsdOp, states, states.blocks(), device, exec);
        const auto differentiate = [&](auto kernel) {
            launch<Real>(kSsdOp, kernel, kernel.blocks(), device, exec);
        };
        is_wide ? differentiate(Wide{in, out, window}) : differentiate(Slim{in, out, window});
        const std::int64_t begin = window * out.window_steps();
        const std::int64_t steps = std::min(in.seqlen - begin, out.window_steps());
        sum_ssd_slices(in, out, out.dB, grads.dB, begin, steps, device, exec);
        sum_ssd_slices(in, out, out.dC, grads.dC, begin, steps, device, exec);
    }
    const std::int64_t parts = in.batch * out.tiles, halves = parts * kSsdHalves;
    sum_ssd_parts(out.dA, grads.dA, halves, in.heads, 1, device, exec);
    sum_ssd_parts(out.dbias, grads.ddt_bias, halves, in.heads, 1, device, exec);
    if (args.D.ndim == 2)
        sum_ssd_parts(out.dD, grads.dD, parts, in.heads * in.headdim, 1, device, exec);
    else
        sum_ssd_parts(out.dD, grads.dD, parts, in.heads, in.headdim, device, exec);
}

/// Calls use(real, element) with values of the compute type and of the type of the matrices.
template <class Use>
void with_types(DType dtype, Use&& use) {
    with_memory_type(dtype, [&](auto element) {
        using Element = decltype(element);
        use(std::conditional_t<std::is_same_v<Element, double>, double, float>{}, element);
    });
}

}  // namespace

std::int64_t ssd_chunk_scan_bwd_workspace(const SsdChunkScanArgs& args) {
    const SsdInputs in = ssd_inputs(args, 0);
    std::int64_t bytes = 0;
    with_types(args.X.dtype, [&](auto real, auto element) {
        SsdWorkspace<decltype(real)> workspace{nullptr};
        SsdGradients<decltype(real)> unused{};
        workspace.template lay_out<decltype(element)>(in, unused);
        bytes = workspace.used;
    });
    return bytes;
}

void ssd_chunk_scan_bwd(const SsdChunkScanArgs& args, const SsdChunkScanGrads& grads,
                        std::int64_t num_states, const Exec& exec) {
    const SsdInputs in = ssd_inputs(args, num_states);
    with_types(args.X.dtype, [&](auto real, auto element) {
        start<decltype(real), decltype(element)>(in, args, grads, exec);
    });
}

}  // namespace ssm::cuda
