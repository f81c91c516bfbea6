// One token, or a few, of the selective recurrence on the device. A team of neighbouring threads
// owns a channel and keeps its state in registers from the first token to the last: the state is
// read once and written once, 16 bytes at a time where its layout and address allow it.
#include "kernels.h"
#include "launch.cuh"
#include "numerics.cuh"

namespace ssm::cuda {

namespace {

constexpr const char* kOp = "selective_state_step";
constexpr int kBlock = 128;
constexpr int kMostLanes = 32;
/// Blocks that fill a GPU. With fewer, a thread takes one channel instead of several.
constexpr std::int64_t kFullDevice = 264;

/// Neighbouring states that are moved as one: 16 bytes, or 32 of double.
template <class Memory>
constexpr int kStatePack = sizeof(Memory) == 2 ? 8 : 4;

template <class Memory, class Real, int kCount>
SSM_DEVICE void load_pack(const Memory* from, Real (&to)[kCount]) {
    const auto pack = *reinterpret_cast<const Pack<Memory, kCount>*>(from);
    SSM_UNROLL
    for (int s = 0; s < kCount; ++s) to[s] = static_cast<Real>(widen(pack.of[s]));
}
template <class Memory, class Real, int kCount>
SSM_DEVICE void store_pack(const Real (&from)[kCount], Memory* to) {
    Pack<Memory, kCount> pack;
    SSM_UNROLL
    for (int s = 0; s < kCount; ++s) narrow(from[s], pack.of[s]);
    *reinterpret_cast<Pack<Memory, kCount>*>(to) = pack;
}

/// The problem in plain numbers, in the canonical form of the front.
struct StepInputs {
    Plane<4> state;          // (R, H, P, N)
    Plane<4> x, dt, z, y;    // (B, T, H, P)
    Plane<3> A;              // (H, P, N)
    Plane<4> B, C;           // (B, T, G, N)
    Plane<2> D, dt_bias;     // (H, P)
    Plane<1> state_indices;  // (B), int32
    std::int64_t batch, tokens, heads, headdim, dstate, num_states;
    std::int64_t group_heads_B, group_heads_C;  // heads that share B, and C
    bool softplus;
    bool tied;      // A does not depend on the state
    bool packed_A;  // made of aligned fours of the compute type

    explicit StepInputs(const SelectiveStateStepArgs& args)
        : state(plane<4>(args.state)),
          x(plane<4>(args.x)),
          dt(plane<4>(args.dt)),
          z(plane<4>(args.z)),
          y(plane<4>(args.y)),
          A(plane<3>(args.A)),
          B(plane<4>(args.B)),
          C(plane<4>(args.C)),
          D(plane<2>(args.D)),
          dt_bias(plane<2>(args.dt_bias)),
          state_indices(plane<1>(args.state_indices)),
          batch(args.x.shape[0]),
          tokens(args.x.shape[1]),
          heads(args.x.shape[2]),
          headdim(args.x.shape[3]),
          dstate(args.state.shape[3]),
          num_states(args.state.shape[0]),
          group_heads_B(heads / args.B.shape[2]),
          group_heads_C(heads / args.C.shape[2]),
          softplus(args.softplus),
          tied(dstate > 0 && args.A.stride[2] == 0),
          packed_A(in_packs(args.A, 2, 4) &&
                   args.A.dtype == (args.x.dtype == DType::f64 ? DType::f64 : DType::f32)) {}
};

/// kPacks: packs of states of one channel that a thread holds.
template <class Memory, class Real, int kPacks>
struct Step {
    static constexpr int kThreads = kBlock;
    static constexpr int kBlocksPerUnit =
        kAfterHopper || (kPacks > 1 && (sizeof(Memory) == 2 || kBeforeHopper)) ? 4 : 5;
    static constexpr int kPack = kStatePack<Memory>;
    static constexpr int kChannels = kPacks == 1 ? 16 / kPack : 2;  // of one thread, at most

    struct Registers {
        Real h[kChannels][kPacks][kPack];
        Real y[kChannels];
    };

    StepInputs in;
    bool packed;         // the state is made of aligned packs
    int lanes;           // threads of a team, a power of two
    int channels;        // of one thread
    std::int64_t tiles;  // blocks of one head

    Step(const StepInputs& inputs, bool is_packed) : in(inputs), packed(is_packed), lanes(1) {
        while (lanes < kMostLanes && slab() < in.dstate) lanes *= 2;
        for (channels = kChannels;; channels = 1) {
            tiles = (in.headdim + tile() - 1) / tile();
            if (channels == 1 || blocks() >= kFullDevice) break;
        }
    }
    std::int64_t blocks() const { return in.tokens > 0 ? in.batch * in.heads * tiles : 0; }
    std::int64_t shared_size() const { return 2 * slab() + 4 * tile(); }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const Part part = part_of(index);
        if (part.state_row < 0 || part.state_row >= in.num_states) {
            block.each([&](int thread, Registers&) { write_zeros(part, thread); });
        } else if (in.dstate <= slab()) {
            block.each([&](int thread, Registers& r) { enter(part, thread, 0, r); });
            for (std::int64_t token = 0; token < in.tokens; ++token) {
                advance(block, part, token, 0, true);
                put_outputs(block, part, token);
            }
            block.each([&](int thread, Registers& r) { leave(part, thread, 0, r); });
        } else {
            replay(block, part);
        }
    }

  private:
    /// Channels of one head of one batch row.
    struct Part {
        std::int64_t row, head, first_channel, state_row;
        int count;
    };

    SSM_BOTH int slab() const { return lanes * kPacks * kPack; }  // states of a team
    SSM_BOTH int teams() const { return kThreads / lanes; }
    SSM_BOTH int tile() const { return teams() * channels; }

    // Places in shared memory: B and C of a slab, then what each channel needs of a token.
    SSM_DEVICE int place_C() const { return slab(); }
    SSM_DEVICE int place_rate() const { return 2 * slab(); }  // or the decay itself, where tied
    SSM_DEVICE int place_drive() const { return place_rate() + tile(); }
    SSM_DEVICE int place_skip() const { return place_rate() + 2 * tile(); }
    SSM_DEVICE int place_gate() const { return place_rate() + 3 * tile(); }

    SSM_DEVICE int channel_of(int thread, int i) const { return i * teams() + thread / lanes; }
    SSM_DEVICE int state_of(int thread, int pack) const {
        return (pack * lanes + thread % lanes) * kPack;
    }

    SSM_DEVICE Part part_of(std::int64_t index) const {
        Part part;
        const std::int64_t line = quotient(index, tiles);
        part.first_channel = (index - line * tiles) * tile();
        part.row = quotient(line, in.heads);
        part.head = line - part.row * in.heads;
        const std::int64_t left = in.headdim - part.first_channel;
        part.count = static_cast<int>(left < tile() ? left : tile());
        part.state_row = part.row;
        if (in.state_indices)
            part.state_row = static_cast<const std::int32_t*>(
                in.state_indices.data)[part.row * in.state_indices.stride[0]];
        return part;
    }

    static SSM_DEVICE std::int64_t offset(const Plane<4>& tensor, const Part& part,
                                          std::int64_t token, int channel) {
        return part.row * tensor.stride[0] + token * tensor.stride[1] +
               part.head * tensor.stride[2] + (part.first_channel + channel) * tensor.stride[3];
    }
    static SSM_DEVICE std::int64_t offset(const Plane<2>& tensor, const Part& part, int channel) {
        return part.head * tensor.stride[0] + (part.first_channel + channel) * tensor.stride[1];
    }
    SSM_DEVICE std::int64_t rate_offset(const Part& part, int channel) const {
        return part.head * in.A.stride[0] + (part.first_channel + channel) * in.A.stride[1];
    }

    /// Calls use(h, from, count) for the packs of a thread that hold states: the pack, its memory,
    /// and how many of its states exist.
    template <class Use>
    SSM_DEVICE void each_pack(const Part& part, int thread, std::int64_t first, Registers& r,
                              Use&& use) const {
        SSM_UNROLL
        for (int i = 0; i < kChannels; ++i) {
            const int channel = channel_of(thread, i);
            if (i >= channels || channel >= part.count) continue;
            Memory* const line = static_cast<Memory*>(in.state.data) +
                                 part.state_row * in.state.stride[0] +
                                 part.head * in.state.stride[1] +
                                 (part.first_channel + channel) * in.state.stride[2];
            SSM_UNROLL
            for (int pack = 0; pack < kPacks; ++pack) {
                const std::int64_t state = first + state_of(thread, pack);
                if (state < in.dstate)
                    use(r.h[i][pack], line + state * in.state.stride[3], in.dstate - state);
            }
        }
    }
    SSM_DEVICE void enter(const Part& part, int thread, std::int64_t first, Registers& r) const {
        each_pack(part, thread, first, r,
                  [&](Real(&h)[kPack], const Memory* from, std::int64_t count) {
                      if (packed) return load_pack(from, h);
                      SSM_UNROLL
                      for (int s = 0; s < kPack; ++s)
                          h[s] = s < count ? static_cast<Real>(widen(from[s * in.state.stride[3]]))
                                           : Real(0);
                  });
    }
    SSM_DEVICE void leave(const Part& part, int thread, std::int64_t first, Registers& r) const {
        each_pack(part, thread, first, r,
                  [&](const Real(&h)[kPack], Memory* to, std::int64_t count) {
                      if (packed) return store_pack(h, to);
                      SSM_UNROLL
                      for (int s = 0; s < kPack; ++s)
                          if (s < count) narrow(h[s], to[s * in.state.stride[3]]);
                  });
    }

    /// What the channels need of a token, and B and C of a slab, into shared memory.
    template <class Block>
    SSM_DEVICE void prepare(Block& block, const Part& part, int thread, std::int64_t token,
                            std::int64_t first) const {
        const auto copy_states = [&](int place, const Plane<4>& tensor, std::int64_t group_heads) {
            const std::int64_t from = part.row * tensor.stride[0] + token * tensor.stride[1] +
                                      quotient(part.head, group_heads) * tensor.stride[2];
            SSM_ROLLED
            for (int s = thread; s < slab(); s += kThreads)
                block.write(place + s,
                            first + s < in.dstate
                                ? tensor.template load<Real>(from + (first + s) * tensor.stride[3])
                                : Real(0));
        };
        copy_states(0, in.B, in.group_heads_B);
        copy_states(place_C(), in.C, in.group_heads_C);
        SSM_ROLLED
        for (int channel = thread; channel < part.count; channel += kThreads) {
            Real size = in.dt.template load<Real>(offset(in.dt, part, token, channel));
            const Real x = in.x.template load<Real>(offset(in.x, part, token, channel));
            if (in.dt_bias)
                size += in.dt_bias.template load<Real>(offset(in.dt_bias, part, channel));
            if (in.softplus) size = softplus(size);
            Real rate = size * static_cast<Real>(kLog2e);
            if (in.tied)
                rate = exp2_of(rate * in.A.template load<Real>(rate_offset(part, channel)));
            block.write(place_rate() + channel, rate);
            block.write(place_drive() + channel, size * x);
            if (in.D)
                block.write(place_skip() + channel,
                            x * in.D.template load<Real>(offset(in.D, part, channel)));
            if (in.z)
                block.write(place_gate() + channel,
                            silu(in.z.template load<Real>(offset(in.z, part, token, channel))));
        }
    }

    /// The rates of a pack of states.
    SSM_DEVICE void load_rates(const Part& part, int channel, std::int64_t state,
                               Real (&rates)[kPack / 4][4]) const {
        const std::int64_t offset = rate_offset(part, channel) + state * in.A.stride[2];
        if (in.packed_A) {
            SSM_UNROLL
            for (int four = 0; four < kPack / 4; ++four)
                if (state + four * 4 < in.dstate)  // a pack of the state may be longer than A
                    load_pack(static_cast<const Real*>(in.A.data) + offset + four * 4, rates[four]);
            return;
        }
        visit(in.A.dtype, [&](auto* type) {
            using Rate = std::remove_pointer_t<decltype(type)>;
            const Rate* from = static_cast<const Rate*>(in.A.data) + offset;
            SSM_UNROLL
            for (int s = 0; s < kPack; ++s)
                rates[s / 4][s % 4] = state + s < in.dstate
                                          ? static_cast<Real>(widen(from[s * in.A.stride[2]]))
                                          : Real(0);
        });
    }

    /// h = decay h + drive B over one token, and with `sums` y += C h.
    template <class Block>
    SSM_DEVICE void advance(Block& block, const Part& part, std::int64_t token, std::int64_t first,
                            bool sums) const {
        block.barrier();
        block.each([&](int thread, Registers&) { prepare(block, part, thread, token, first); });
        block.barrier();
        block.each([&](int thread, Registers& r) {
            if (first == 0)
                for (Real& y : r.y) y = 0;
            SSM_UNROLL
            for (int pack = 0; pack < kPacks; ++pack) {
                const int place = state_of(thread, pack);
                const std::int64_t state = first + place;
                if (state >= in.dstate) continue;
                Real B[kPack / 4][4], C[kPack / 4][4], rates[kPack / 4][4] = {};
                SSM_UNROLL
                for (int four = 0; four < kPack / 4; ++four) {
                    block.read4(place + four * 4, B[four]);
                    block.read4(place_C() + place + four * 4, C[four]);
                }
                SSM_UNROLL
                for (int i = 0; i < kChannels; ++i) {
                    const int channel = channel_of(thread, i);
                    if (i >= channels || channel >= part.count) continue;
                    const Real rate = block.read(place_rate() + channel);
                    const Real drive = block.read(place_drive() + channel);
                    if (!in.tied) load_rates(part, channel, state, rates);
                    SSM_UNROLL
                    for (int s = 0; s < kPack; ++s) {
                        const Real kept = in.tied ? rate : exp2_of(rate * rates[s / 4][s % 4]);
                        Real& h = r.h[i][pack][s];
                        h = fma_of(kept, h, drive * B[s / 4][s % 4]);
                        // An infinite drive makes no number of a state that does not exist.
                        if (sums && state + s < in.dstate)
                            r.y[i] = fma_of(C[s / 4][s % 4], h, r.y[i]);
                    }
                }
            }
        });
    }

    /// y = (sum + D x) silu(z).
    template <class Block>
    SSM_DEVICE void put_outputs(Block& block, const Part& part, std::int64_t token) const {
        SSM_UNROLL
        for (int i = 0; i < kChannels; ++i)
            block.sum_lanes(lanes, [i](Registers& r) -> Real& { return r.y[i]; });
        block.each([&](int thread, Registers& r) {
            if (thread % lanes != 0) return;
            SSM_UNROLL
            for (int i = 0; i < kChannels; ++i) {
                const int channel = channel_of(thread, i);
                if (i >= channels || channel >= part.count) continue;
                Real y = r.y[i];
                if (in.D) y += block.read(place_skip() + channel);
                if (in.z) y *= block.read(place_gate() + channel);
                in.y.store(offset(in.y, part, token, channel), y);
            }
        });
    }

    /// More states than a team holds: slab after slab. What they are between tokens is not kept, so
    /// every token starts from the state before the call.
    template <class Block>
    SSM_DEVICE void replay(Block& block, const Part& part) const {
        for (std::int64_t token = 0; token < in.tokens; ++token) {
            for (std::int64_t first = 0; first < in.dstate; first += slab()) {
                block.each([&](int thread, Registers& r) { enter(part, thread, first, r); });
                for (std::int64_t before = 0; before <= token; ++before)
                    advance(block, part, before, first, before == token);
                if (token + 1 == in.tokens)
                    block.each([&](int thread, Registers& r) { leave(part, thread, first, r); });
            }
            put_outputs(block, part, token);
        }
    }

    SSM_DEVICE void write_zeros(const Part& part, int thread) const {
        for (std::int64_t token = 0; token < in.tokens; ++token)
            for (int channel = thread; channel < part.count; channel += kThreads)
                in.y.store(offset(in.y, part, token, channel), Real(0));
    }
};

template <class Real, class Memory>
void start(const StepInputs& in, const TensorView& state, const Exec& exec) {
    // The states of Mamba-1 fit in one pack per thread; more packs leave fewer sums across threads.
    constexpr std::int64_t kFew = 32;
    constexpr int kSeveral = 16 / kStatePack<Memory>;
    const bool packed = in_packs(state, 3, kStatePack<Memory>);
    if (in.dstate <= kFew) {
        const Step<Memory, Real, 1> step(in, packed);
        launch<Real>(kOp, step, step.blocks(), state.device, exec);
    } else {
        const Step<Memory, Real, kSeveral> step(in, packed);
        launch<Real>(kOp, step, step.blocks(), state.device, exec);
    }
}

}  // namespace

void selective_state_step_fwd(const SelectiveStateStepArgs& args, const Exec& exec) {
    const StepInputs in(args);
    with_compute_type(args.x.dtype, [&](auto zero) {
        using Real = decltype(zero);
        with_memory_type(args.state.dtype, [&](auto element) {
            start<Real, decltype(element)>(in, args.state, exec);
        });
    });
}

}  // namespace ssm::cuda
