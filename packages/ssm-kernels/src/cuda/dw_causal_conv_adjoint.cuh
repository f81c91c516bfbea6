// What the gradients of the causal convolution owe to its inputs, while a thread walks the steps.
#pragma once

#include "dw_causal_conv_tile.cuh"

namespace ssm::cuda {

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

/// Sums of the gradients of kChannels filters and biases.
template <class Real, int kChannels>
struct ConvSums {
    Real taps[kConvTaps][kChannels], bias[kChannels];

    SSM_DEVICE void clear() {
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) {
            bias[c] = 0;
            SSM_UNROLL
            for (int k = 0; k < kConvTaps; ++k) taps[k][c] = 0;
        }
    }
    /// Writes a part (W + 1, D), from the first of these channels on.
    SSM_DEVICE void put(const ConvInputs& in, Real* to) const {
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k) {
            if (k < kConvTaps - in.width) continue;
            SSM_UNROLL
            for (int c = 0; c < kChannels; ++c) to[c] = taps[k][c];
            to += in.dim;
        }
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) to[c] = bias[c];
    }
};

/// The inputs that the filter sees, and what has been summed for the gradient of each of them. A
/// thread has the steps from `first` to `end`, and goes on behind them while it owes them anything.
template <class Real, int kChannels>
struct ConvAdjoint {
    /// Where the gradient of an input goes: a step after the first one, nowhere, or -2 - place for
    /// a place in the initial state.
    static constexpr int kNowhere = -1;

    Walk<Real, kChannels> inputs;
    Real sums[kConvTaps][kChannels];
    int to[kConvTaps];
    std::int64_t row, channel, first, end;

    /// The caller brings `inputs` before `first`.
    SSM_DEVICE void begin(std::int64_t of_row, std::int64_t of_channel, std::int64_t from,
                          std::int64_t until) {
        row = of_row, channel = of_channel, first = from, end = until;
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k) to[k] = kNowhere;
    }

    SSM_DEVICE bool owes() const {
        bool any = false;
        SSM_UNROLL
        for (int k = 1; k < kConvTaps; ++k) any = any || to[k] != kNowhere;
        return any;
    }

    /// Takes the input and the output gradient of a step; put_input(step, gradients) takes what is
    /// complete.
    template <class Memory, class PutInput>
    SSM_DEVICE void advance(const ConvInputs& in, const Gradients<Real>& out, std::int64_t step,
                            const Memory* x, const Memory* dy, ConvSums<Real, kChannels>& weights,
                            const PutInput& put_input) {
        const std::int32_t next = in.sequence_at(row, step);
        const bool own = step < end;
        if (next < 0) {
            if (own) put_input(step, {});
            return;
        }
        if (next != inputs.sequence) {
            if (inputs.sequence >= 0) finish(in, out, in.state_per_sequence, put_input);
            if (!own) return;
            const bool has_state = inputs.change(in, row, channel, step, next);
            SSM_UNROLL
            for (int k = 1; k < kConvTaps; ++k) {
                const int place = k - inputs.missing - 1;
                to[k] = has_state && place >= 0 ? -2 - place : kNowhere;
                SSM_UNROLL
                for (int c = 0; c < kChannels; ++c) sums[k][c] = 0;
            }
        }
        Real newest[kChannels];
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) newest[c] = static_cast<Real>(widen(x[c]));
        inputs.take(newest);
        SSM_UNROLL
        for (int k = 0; k + 1 < kConvTaps; ++k) to[k] = to[k + 1];
        to[kConvTaps - 1] = own ? static_cast<int>(step - first) : kNowhere;
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c) {
            Real gradient = static_cast<Real>(widen(dy[c]));
            if (in.silu) {
                const Real sum = inputs.filter(c);
                gradient *= silu_slope(sum, sigmoid(sum));
            }
            SSM_UNROLL
            for (int k = 0; k + 1 < kConvTaps; ++k) sums[k][c] = sums[k + 1][c];
            sums[kConvTaps - 1][c] = 0;
            SSM_UNROLL
            for (int k = 0; k < kConvTaps; ++k) {
                if (k < inputs.missing) continue;
                sums[k][c] = fma_of(inputs.taps[k][c], gradient, sums[k][c]);
                if (own)
                    weights.taps[k][c] = fma_of(gradient, inputs.window[k][c], weights.taps[k][c]);
            }
            if (own) weights.bias[c] += gradient;
        }
        // As k == inputs.missing, compilers would index registers by the latter, and use local
        // memory.
        const unsigned oldest = 1u << inputs.missing;
        SSM_UNROLL
        for (int k = 0; k < kConvTaps; ++k)
            if (oldest >> k & 1) put(in, out, k, put_input);
    }

    /// The sequence ends: its last inputs are the final state, where there is one.
    template <class PutInput>
    SSM_DEVICE void finish(const ConvInputs& in, const Gradients<Real>& out, bool has_state,
                           const PutInput& put_input) {
        const std::int64_t state = in.state_of(row, inputs.sequence);
        SSM_UNROLL
        for (int k = 1; k < kConvTaps; ++k) {
            if (to[k] == kNowhere || k <= inputs.missing) continue;
            if (has_state) {
                SSM_UNROLL
                for (int c = 0; c < kChannels; ++c)
                    sums[k][c] += out.final_gradient(state, channel + c, k - inputs.missing - 1);
            }
            put(in, out, k, put_input);
        }
    }

  private:
    /// Hands on the gradient of an input, which is complete.
    template <class PutInput>
    SSM_DEVICE void put(const ConvInputs& in, const Gradients<Real>& out, int k,
                        const PutInput& put_input) {
        const int place = to[k];
        to[k] = kNowhere;
        if (place == kNowhere) return;
        if (place >= 0) return put_input(first + place, sums[k]);
        if (!out.dinitial_state) return;
        SSM_UNROLL
        for (int c = 0; c < kChannels; ++c)
            out.dinitial_state.store(
                in.offset(out.dinitial_state, in.state_of(row, inputs.sequence), channel + c,
                          -2 - place),
                sums[k][c]);
    }
};

}  // namespace ssm::cuda
