// The forward of the state-space dual scan on the device: a chain. A block owns a slab of channels
// of one head of one row, keeps their state in registers, and walks the steps piece by piece:
//   S = C B^T,  Y = e C H + M X  with  M = S . decay . step size,  H = decay H + (w X)^T B
// A warp owns 16 steps of S, Y and M, so that M goes from the accumulators of one product to the
// operand of the next without leaving registers, and Y leaves in the order of memory; and it owns
// 16 channels of H. What crosses warps is H alone, rounded to the type of the matrices.
#include "kernels.h"
#include "ssd_chunk_scan_chain.cuh"

namespace ssm::cuda {

namespace {

/// With many states two groups of four warps own half of them each, and half of the channels of Y:
/// one group has no registers for all, and fewer where products are more than an instruction.
template <class Matter, int kStates>
constexpr int kForwardGroups = kStates <= (kIsOneInstruction<Matter> ? 128 : 64) ? 1 : 2;

template <class Real, class Matter, int kStates>
struct Forward : SsdChain<Real, kStates / kForwardGroups<Matter, kStates>> {
    static constexpr int kGroups = kForwardGroups<Matter, kStates>;
    static constexpr int kOwnStates = kStates / kGroups, kOwnChannels = kSsdChannels / kGroups;
    static constexpr int kThreads = kSsdThreads * kGroups;
    static constexpr int kBlocksPerUnit = 2 / kGroups;
    using Element = Matter;
    using Chain = SsdChain<Real, kOwnStates>;
    using Chain::in, Chain::y, Chain::only_ends;

    // Places in the memory of matrices: the rounded states of one slab of states, then C, B and X,
    // once or twice.
    static constexpr int kWidest = sizeof(Element) == 2 ? 128 : 32;
    static constexpr int kSlab = kOwnStates < kWidest ? kOwnStates : kWidest;
    static_assert(kOwnStates % kSlab == 0);  // a slab belongs to one group
    static constexpr int kSlabs = kStates / kSlab;
    static constexpr int kAcrossSlab = matrix_stride(kSlab);
    static constexpr int kStages = kSsdChannels * kAcrossSlab;
    static constexpr int kAcross = matrix_stride(kStates), kAcrossX = matrix_stride(kSsdChannels);
    static constexpr int kStage = kSsdTile * (2 * kAcross + kAcrossX);
    static constexpr int kHalf = kSsdTile / 2;  // of the columns of S, which saves registers
    // In the other memory: decays, then D.
    static constexpr int kD = SsdDecays::kSize;

    struct Registers {
        Real h[kOwnStates / 8][4];
        Real s[kHalf / 8][4], y[kOwnChannels / 8][4];  // S for half of its columns
        // Step sizes before their clamp, in one warp: of the piece to multiply, and of the last one
        // that came.
        Real raw[2], coming[2];
        Real time;  // logarithm of the decay since the part began
    };

    int stages = 1;  // 2: the next piece comes while this one is multiplied
    bool packed_y = false, packed_z = false;

    /// With many states two stages never leave room for a second block.
    SSM_BOTH int stage_count() const { return kStates <= 128 ? stages : 1; }
    std::int64_t shared_size() const { return kD + kSsdChannels; }
    SSM_BOTH std::int64_t matrix_size() const { return kStages + stage_count() * kStage; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        const SsdPart part = ssd_part(in, index);
        block.each([&](int thread, Registers& r) { enter(block, part, thread, r); });
        for (int segment = 0; segment < part.segment && !only_ends; ++segment) {
            block.forget();
            block.each([&](int thread, Registers& r) { this->pass(part, segment, thread, r); });
        }
        SsdPieces pieces(in, part.row, part.begin, part.end);
        SsdPiece piece{};
        for (int turn = 0;; ++turn) {
            block.forget();
            const SsdPiece coming = pieces.next(block, in);
            const int stage = turn & (stage_count() - 1);
            block.each([&](int thread, Registers& r) {
                r.raw[0] = r.coming[0], r.raw[1] = r.coming[1];
                if (coming.steps > 0) fetch(block, part, coming, stage, thread, r);
                if (stage_count() == 1) r.raw[0] = r.coming[0], r.raw[1] = r.coming[1];
                block.commit_copies(thread);
            });
            // With two stages it is multiplied while the one after it comes.
            if (stage_count() == 1) piece = coming;
            if (piece.steps > 0) walk(block, part, piece, stage_count() == 1 ? 0 : 1 - stage);
            if (coming.steps == 0) break;
            piece = coming;
        }
        block.forget();
        block.each(
            [&](int thread, Registers& r) { this->leave(part, pieces.sequence(), thread, r); });
    }

  private:
    /// Which 16 steps, or channels of H, are a warp's; and its group.
    static SSM_DEVICE int band(int warp) { return kGroups == 1 ? warp : warp % 4; }
    static SSM_DEVICE int group(int warp) { return kGroups == 1 ? 0 : warp / 4; }
    static SSM_DEVICE Matrix states() { return {0, kAcrossSlab}; }
    static SSM_DEVICE Matrix C_of(int stage) { return {kStages + stage * kStage, kAcross}; }
    static SSM_DEVICE Matrix B_of(int stage) {
        return {kStages + stage * kStage + kSsdTile * kAcross, kAcross};
    }
    static SSM_DEVICE Matrix X_of(int stage) {
        return {kStages + stage * kStage + 2 * kSsdTile * kAcross, kAcrossX};
    }

    /// The state that enters the row.
    template <class Block>
    SSM_DEVICE void enter(Block& block, const SsdPart& part, int thread, Registers& r) const {
        if (thread < kSsdChannels) block.write(kD + thread, this->skip_of(part, thread));
        Chain::enter(part, thread, r);
    }

    template <class Block>
    SSM_DEVICE void fetch(Block& block, const SsdPart& part, const SsdPiece& piece, int stage,
                          int thread, Registers& r) const {
        if (!only_ends)
            fetch_rows<Element, kStates, kThreads>(block, thread, C_of(stage), in.C, in.copies_C,
                                                   part.row, quotient(part.head, in.group_heads_C),
                                                   0, in.dstate, piece);
        fetch_rows<Element, kStates, kThreads>(block, thread, B_of(stage), in.B, in.copies_B,
                                               part.row, quotient(part.head, in.group_heads_B), 0,
                                               in.dstate, piece);
        fetch_rows<Element, kSsdChannels, kThreads>(block, thread, X_of(stage), in.X, in.copies_X,
                                                    part.row, part.head, part.first_channel,
                                                    part.channels, piece);
        if (thread < kWarp) fetch_steps(in, part.row, part.head, piece, thread, r.coming);
    }

    /// Everything that one piece is for.
    template <class Block>
    SSM_DEVICE void walk(Block& block, const SsdPart& part, const SsdPiece& piece,
                         int stage) const {
        block.each([&](int thread, Registers& r) {
            if (piece.starts) {
                this->end_sequence(part, piece, thread, r);
                this->begin_sequence(part, piece, thread, r);
            }
            if (!only_ends) publish(block, thread, 0, r);
        });
        block.each_warp([&](auto& warp) {
            if (warp.index == 0)
                write_decays<Real>(block, warp, in, part.head, piece,
                                   [&](int lane) -> auto& { return warp.registers(lane).raw; });
        });
        block.each(
            [&](int thread, Registers&) { block.wait_for_copies(thread, stage_count() == 1); });
        block.barrier();
        if (!only_ends) {
            outputs(block, piece, stage);
            block.forget();
            block.each(
                [&](int thread, Registers& r) { store(block, part, piece, stage, thread, r); });
        }
        advance(block, piece, stage);
        block.barrier();
    }

    /// Writes the states of one slab where all warps read them.
    template <class Block>
    SSM_DEVICE void publish(Block& block, int thread, int slab, const Registers& r) const {
        const int lane = thread % kWarp, channel = band(thread / kWarp) * 16 + lane / 4;
        const int first = group(thread / kWarp) * kOwnStates / kSlab;
        SSM_UNROLL
        for (int n = 0; n < kOwnStates / 8; ++n) {
            if (first + n / (kSlab / 8) != slab) continue;
            const int state = n % (kSlab / 8) * 8 + lane % 4 * 2;
            block.write_pair(states().at(channel, state), operand<Element>(r.h[n][0], r.h[n][1]));
            block.write_pair(states().at(channel + 8, state),
                             operand<Element>(r.h[n][2], r.h[n][3]));
        }
    }

    /// Y before D and z.
    template <class Block>
    SSM_DEVICE void outputs(Block& block, const SsdPiece& piece, int stage) const {
        block.each([&](int, Registers& r) {
            SSM_UNROLL
            for (int i = 0; i < kOwnChannels / 2; ++i) r.y[i / 4][i % 4] = 0;
            clear_s(r);
        });
        SSM_UNROLL
        for (int slab = 0; slab < kSlabs; ++slab) {
            if (slab > 0) {
                block.barrier();
                block.each([&](int thread, Registers& r) { publish(block, thread, slab, r); });
                block.barrier();
            }
            block.each_warp([&](auto& warp) {
                if (band(warp.index) * 16 < piece.steps) multiply_slab(warp, stage, slab);
            });
        }
        block.each_warp([&](auto& warp) {
            if (band(warp.index) * 16 >= piece.steps) return;
            warp.each([&](int lane, Registers& r) { scale_y(block, band(warp.index), lane, r); });
            multiply_inside(block, warp, stage, 0);
            if (band(warp.index) * 16 < kHalf) return;
            warp.each([&](int, Registers& r) { clear_s(r); });
            PerLane<Fragment<Element>> left;
            SSM_UNROLL_TWICE
            for (int k = 0; k < kStates; k += 16) {
                load_left(warp, C_of(stage), band(warp.index) * 16, k, left);
                multiply_steps(warp, left, stage, k, 1);
            }
            multiply_inside(block, warp, stage, 1);
        });
    }

    static SSM_DEVICE void clear_s(Registers& r) {
        SSM_UNROLL
        for (int i = 0; i < kHalf / 2; ++i) r.s[i / 4][i % 4] = 0;
    }

    /// y += C H for the states of a slab, and s += C B^T for the first half of its columns.
    template <class Warp>
    SSM_DEVICE void multiply_slab(Warp& warp, int stage, int slab) const {
        PerLane<Fragment<Element>> left, right;
        SSM_UNROLL_TWICE
        for (int k = 0; k < kSlab; k += 16) {
            load_left(warp, C_of(stage), band(warp.index) * 16, slab * kSlab + k, left);
            SSM_UNROLL
            for (int n = 0; n < kOwnChannels / 16; ++n) {
                load_right(warp, states(), k, group(warp.index) * kOwnChannels + n * 16, right);
                multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                    return warp.registers(lane).y[2 * n + side];
                });
            }
            multiply_steps(warp, left, stage, slab * kSlab + k, 0);
        }
    }

    /// s += C B^T for 16 states and half of the columns, as far as steps come before those of C.
    template <class Warp, class Left>
    SSM_DEVICE void multiply_steps(Warp& warp, Left& left, int stage, int k, int half) const {
        PerLane<Fragment<Element>> right;
        SSM_UNROLL
        for (int n = 0; n < kHalf / 16; ++n) {
            if (half * kHalf / 16 + n > band(warp.index)) continue;
            load_right(warp, B_of(stage), k, half * kHalf + n * 16, right);
            multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                return warp.registers(lane).s[2 * n + side];
            });
        }
    }

    /// y = e y.
    template <class Block>
    SSM_DEVICE void scale_y(Block& block, int band, int lane, Registers& r) const {
        SSM_UNROLL
        for (int row = 0; row < 2; ++row) {
            const int step = band * 16 + lane / 4 + row * 8;
            const Real decay =
                exp2_of(block.read(SsdDecays::kHigh + step) + block.read(SsdDecays::kLow + step));
            SSM_UNROLL
            for (int n = 0; n < kOwnChannels / 8; ++n)
                r.y[n][2 * row] *= decay, r.y[n][2 * row + 1] *= decay;
        }
    }

    /// y += M X for half of the columns of M.
    template <class Block, class Warp>
    SSM_DEVICE void multiply_inside(Block& block, Warp& warp, int stage, int half) const {
        PerLane<Fragment<Element>> left, right;
        SSM_UNROLL
        for (int k = 0; k < kHalf / 16; ++k) {
            if (half * kHalf / 16 + k > band(warp.index)) continue;
            const int from = half * kHalf + k * 16;
            warp.each([&](int lane, Registers& r) {
                SSM_UNROLL
                for (int side = 0; side < 2; ++side)
                    weigh(block, band(warp.index) * 16 + lane / 4, from + side * 8 + lane % 4 * 2,
                          r.s[2 * k + side]);
                left(lane) = left_of<Element>(r.s[2 * k], r.s[2 * k + 1]);
            });
            SSM_UNROLL
            for (int n = 0; n < kOwnChannels / 16; ++n) {
                load_right<true>(warp, X_of(stage), from, group(warp.index) * kOwnChannels + n * 16,
                                 right);
                multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                    return warp.registers(lane).y[2 * n + side];
                });
            }
        }
    }

    /// M from S: the steps `to` and to + 8 as reached from the steps `from` and from + 1.
    template <class Block>
    SSM_DEVICE void weigh(Block& block, int to, int from, Real (&s)[4]) const {
        SSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int i_to = to + i / 2 * 8, i_from = from + i % 2;
            const Real decay = decay_between(
                block.read(SsdDecays::kHigh + i_to), block.read(SsdDecays::kLow + i_to),
                block.read(SsdDecays::kHigh + i_from), block.read(SsdDecays::kLow + i_from));
            // Chosen, not multiplied by 0: the decay from a later step may be infinite.
            s[i] = i_from <= i_to ? s[i] * decay * block.read(SsdDecays::kStep + i_from) : Real(0);
        }
    }

    /// y = (y + D x) silu(z), and 0 where a step is skipped.
    template <class Block>
    SSM_DEVICE void store(Block& block, const SsdPart& part, const SsdPiece& piece, int stage,
                          int thread, Registers& r) const {
        const int lane = thread % kWarp;
        const int column = group(thread / kWarp) * kOwnChannels + lane % 4 * 2;
        SSM_UNROLL
        for (int row = 0; row < 2; ++row) {
            const int step = band(thread / kWarp) * 16 + lane / 4 + row * 8;
            if (step >= piece.steps) continue;
            if (in.D) {
                SSM_UNROLL
                for (int n = 0; n < kOwnChannels / 8; ++n) {
                    const int channel = n * 8 + column;
                    const auto x = block.read_pair(X_of(stage).at(step, channel));
                    r.y[n][2 * row] += block.read(kD + channel) * first_of(x);
                    r.y[n][2 * row + 1] += block.read(kD + channel + 1) * second_of(x);
                }
            }
            if (in.z) {
                // The sums of S are not needed any more.
                each_pair(part, piece, in.z, step, column,
                          [&](auto pair, int n, auto* from, auto* second) {
                              using Two = decltype(pair);
                              Real* const z = r.s[n / 2] + n % 2 * 2;
                              if (packed_z) {
                                  pair = *reinterpret_cast<const Two*>(from);
                                  z[0] = static_cast<Real>(widen(pair.of[0]));
                                  z[1] = static_cast<Real>(widen(pair.of[1]));
                              } else {
                                  z[0] = static_cast<Real>(widen(*from));
                                  if (second) z[1] = static_cast<Real>(widen(*second));
                              }
                          });
                SSM_UNROLL
                for (int n = 0; n < kOwnChannels / 8; ++n) {
                    r.y[n][2 * row] *= silu(r.s[n / 2][n % 2 * 2]);
                    r.y[n][2 * row + 1] *= silu(r.s[n / 2][n % 2 * 2 + 1]);
                }
            }
            const bool skipped = !piece.has(step);
            each_pair(part, piece, y, step, column, [&](auto pair, int n, auto* to, auto* second) {
                using Two = decltype(pair);
                narrow(skipped ? Real(0) : r.y[n][2 * row], pair.of[0]);
                narrow(skipped ? Real(0) : r.y[n][2 * row + 1], pair.of[1]);
                if (packed_y) {
                    *reinterpret_cast<Two*>(to) = pair;
                } else {
                    *to = pair.of[0];
                    if (second) *second = pair.of[1];
                }
            });
        }
    }

    /// Calls use(pack of two, n, address of the first, of the second or null) for the elements of
    /// one step of a tensor (B, L, H, P) that belong to the accumulators [n] of a lane.
    template <class Use>
    SSM_DEVICE void each_pair(const SsdPart& part, const SsdPiece& piece, const Plane<4>& tensor,
                              int step, int column, Use&& use) const {
        const std::int64_t base =
            part.row * tensor.stride[0] + (piece.begin + step) * tensor.stride[1] +
            part.head * tensor.stride[2] + (part.first_channel + column) * tensor.stride[3];
        visit(tensor.dtype, [&](auto* type) {
            using Memory = std::remove_pointer_t<decltype(type)>;
            Memory* from = static_cast<Memory*>(tensor.data) + base;
            SSM_UNROLL
            for (int n = 0; n < kOwnChannels / 8; ++n) {
                const int channel = n * 8 + column;
                if (channel < part.channels)
                    use(Pack<Memory, 2>{}, n, from,
                        channel + 1 < part.channels ? from + tensor.stride[3] : nullptr);
                from += 8 * tensor.stride[3];
            }
        });
    }

    /// h = decay h + (w x)^T B.
    template <class Block>
    SSM_DEVICE void advance(Block& block, const SsdPiece& piece, int stage) const {
        block.each([&](int, Registers& r) {
            const Real power = block.read(SsdDecays::kHigh + kSsdTile - 1) +
                               block.read(SsdDecays::kLow + kSsdTile - 1);
            const Real decay = exp2_of(power);
            r.time += power;
            SSM_UNROLL
            for (int i = 0; i < kOwnStates / 2; ++i) r.h[i / 4][i % 4] *= decay;
        });
        block.each_warp([&](auto& warp) {
            PerLane<Fragment<Element>> left, right;
            SSM_ROLLED
            for (int k = 0; k < kSsdTile && k < piece.steps; k += 16) {
                load_left<true>(warp, X_of(stage), band(warp.index) * 16, k, left);
                warp.each([&](int lane, Registers&) {
                    SSM_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const int from = SsdDecays::kLeft + k + half * 8 + lane % 4 * 2;
                        const Real w[2] = {block.read(from), block.read(from + 1)};
                        SSM_UNROLL
                        for (int row = 0; row < 2; ++row) {
                            auto& pair = left(lane).of[half * 2 + row];
                            pair = operand<Element>(first_of(pair) * w[0], second_of(pair) * w[1]);
                        }
                    }
                });
                SSM_UNROLL
                for (int n = 0; n < kOwnStates / 16; ++n) {
                    load_right<true>(warp, B_of(stage), k, group(warp.index) * kOwnStates + n * 16,
                                     right);
                    multiply_both(warp, left, right, [&](int lane, int side) -> auto& {
                        return warp.registers(lane).h[2 * n + side];
                    });
                }
            }
        });
    }
};

template <class Real, class Element, int kStates>
void start(const SsdInputs& in, const SsdChunkScanArgs& args, const Exec& exec) {
    const Device device = args.X.device;
    Forward<Real, Element, kStates> kernel;
    kernel.chain(in, args, exec);
    kernel.stages = 2;
    // Rather two blocks with one stage than one block with two.
    if (2 * shared_bytes<Real>(kernel) > shared_of_multiprocessor(device)) kernel.stages = 1;
    kernel.packed_y = in_packs(args.y, 3, 2);
    kernel.packed_z = in.z && in_packs(args.z, 3, 2);
    check_room<Real>(kSsdOp, kernel, device);
    run_ssd_chain<Real>(kernel, args, ssd_parts(in), exec);
}

}  // namespace

std::int64_t ssd_chunk_scan_fwd_workspace(const SsdChunkScanArgs& args) {
    const SsdInputs in = ssd_inputs(args, 0);
    return args.X.dtype == DType::f64 ? SsdEnds<double>::size(in) * 8
                                      : SsdEnds<float>::size(in) * 4;
}

void ssd_chunk_scan_fwd(const SsdChunkScanArgs& args, std::int64_t num_states, const Exec& exec) {
    const SsdInputs in = ssd_inputs(args, num_states);
    if (starts_on_hopper(in, args, exec)) return;
    with_memory_type(args.X.dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = std::conditional_t<std::is_same_v<Element, double>, double, float>;
        if (in.dstate <= 32) return start<Real, Element, 32>(in, args, exec);
        if (in.dstate <= 64) return start<Real, Element, 64>(in, args, exec);
        if (in.dstate <= 128) return start<Real, Element, 128>(in, args, exec);
        start<Real, Element, 256>(in, args, exec);
    });
}

}  // namespace ssm::cuda
