// The forward of the state-space dual scan on the warpgroups of Hopper: the chain of
// ssd_chunk_scan_fwd.cu, with other owners. A block has three warpgroups, each with a slab of
// channels of a head; B and C, which these heads share, are in shared memory once. The products are
//   S = C B^T,  Y^T = (C H)^T e + X^T M^T  with  M = S . decay . step size,  H = decay H + (w X)^T
//   B
// H and X^T are left operands that never leave registers; what goes through shared memory between
// two products is M alone. Matrices lie there swizzled (warpgroup_gemm.cuh).
#include <numeric>

#include "kernels.h"
#include "ssd_chunk_scan_chain.cuh"
#include "warpgroup_gemm.cuh"

namespace ssm::cuda {

namespace {

constexpr int kGroups = 3;  // warpgroups of a block

/// Which slabs of heads a block owns: a few of those that share B and C.
struct Share {
    std::int64_t heads;   // that share B and C
    std::int64_t slabs;   // of these heads
    std::int64_t blocks;  // for them

    explicit Share(const SsdInputs& in)
        : heads(std::gcd(in.group_heads_B, in.group_heads_C)),
          slabs(heads * in.slabs),
          blocks((slabs + kGroups - 1) / kGroups) {}
};

/// The steps of a row that is one sequence, cut into tiles: what SsdPieces makes of other rows, for
/// fewer registers.
class Tiles {
  public:
    SSM_DEVICE Tiles(const SsdInputs&, int, std::int64_t begin, std::int64_t end)
        : step_(begin), end_(end) {}

    template <class Block>
    SSM_DEVICE SsdPiece next(Block&, const SsdInputs&) {
        const std::int64_t begin = step_, left = end_ - begin;
        step_ += kSsdTile;
        return {begin, static_cast<int>(left < kSsdTile ? left : kSsdTile), 0, false, -1, -1};
    }

  private:
    std::int64_t step_, end_;
};

template <class Matter, int kStates, bool kPacked>
struct ForwardOnHopper : SsdChain<float, kStates, 1, float> {
    using Real = float;
    using Element = Matter;
    using Chain = SsdChain<Real, kStates, 1, float>;
    using Chain::in, Chain::y;
    using Pieces = std::conditional_t<kPacked, SsdPieces, Tiles>;

    using HasProducts = void;
    static constexpr int kThreads = kGroups * kWarpgroup;
    static constexpr int kBlocksPerUnit = 1;

    // Places in the memory of matrices: C, B and an X for each warpgroup, twice; then an M for
    // each.
    static constexpr int kWide = kStates / 64 * Swizzled::kSlab;
    static constexpr int kStage = 2 * kWide + kGroups * Swizzled::kSlab;
    // In the other memory, for each warpgroup: decays, those from the begin of a piece (below 0:
    // no step, where rows are packed), and D.
    static constexpr int kUpto = SsdDecays::kSize, kD = kUpto + kSsdTile;
    static constexpr int kDecays = kD + kSsdChannels;

    struct Registers {
        Real h[kStates / 8][4];
        Real s[kSsdTile / 8][4];             // S, then Y^T
        Fragment<Element> x[kSsdTile / 16];  // X^T, then w X^T
        Real raw[2];                         // step sizes before their clamp, in one warp
        Real time;                           // of a chain that is cut
    };

    Share share;
    bool stages_y = false;  // it leaves through shared memory, 16 bytes at a time

    std::int64_t shared_size() const { return kGroups * kDecays; }
    SSM_BOTH std::int64_t matrix_size() const { return 2 * kStage + kGroups * Swizzled::kSlab; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        if constexpr (kHasWarpgroups)
            run_block(block, index);
        else
            stop();
    }

  private:
    static SSM_DEVICE Swizzled C_of(int stage) { return {stage * kStage}; }
    static SSM_DEVICE Swizzled B_of(int stage) { return {stage * kStage + kWide}; }
    static SSM_DEVICE Swizzled X_of(int stage, int group) {
        return {stage * kStage + 2 * kWide + group * Swizzled::kSlab};
    }
    static SSM_DEVICE Swizzled M_of(int group) { return {2 * kStage + group * Swizzled::kSlab}; }

    /// The part of a warpgroup of a block. Without channels if there is none; then a part beside
    /// it.
    SSM_DEVICE SsdPart part_of(std::int64_t index, int group) const {
        const std::int64_t shares = quotient(index, share.blocks);
        std::int64_t slab = (index - shares * share.blocks) * kGroups + group;
        const bool exists = slab < share.slabs;
        if (!exists) slab = 0;
        SsdPart part = ssd_part(in, shares * share.slabs + slab);
        if (!exists) part.channels = 0;
        return part;
    }

    template <class Block>
    SSM_DEVICE void run_block(Block& block, std::int64_t index) const {
        block.forget();
        block.each_warpgroup([&](auto& group) {
            const SsdPart part = part_of(index, group.index);
            if (part.channels == 0) return;
            group.each([&](int thread, Registers& r) {
                if (thread < kSsdChannels)
                    block.write(group.index * kDecays + kD + thread, this->skip_of(part, thread));
                this->enter(part, thread, r);
            });
        });
        // The same part again: that of before would take registers beside the states that enter.
        PerWarpgroup<SsdPart> parts;
        block.each_warpgroup(
            [&](auto& group) { parts(group.index) = part_of(index, fresh(group.index)); });
        block.each_warpgroup([&](auto& group) { forget(block, parts(group.index)); });
        Pieces pieces(in, parts(0).row, 0, in.seqlen);
        SsdPiece piece = pieces.next(block, in);
        fetch(block, parts, piece, 0);
        block.each_warpgroup([&](auto& group) {
            const SsdPart& part = parts(group.index);
            group.each([&](int thread, Registers& r) {
                if (thread < kWarp) fetch_steps(in, part.row, part.head, piece, thread, r.raw);
            });
        });
        for (int stage = 0; piece.steps > 0; stage = 1 - stage) {
            block.each_warpgroup([&](auto& group) { forget(block, parts(group.index)); });
            block.each([&](int thread, Registers&) {
                block.wait_for_copies(thread);
                block.fence_for_products();
            });
            block.barrier();
            // The memory of the piece before is free: the next one comes while this is multiplied.
            const SsdPiece coming = pieces.next(block, in);
            if (coming.steps > 0) fetch(block, parts, coming, 1 - stage);
            block.each_warpgroup([&](auto& group) {
                SsdPart& part = parts(group.index);
                if (part.channels > 0) walk(block, group, part, piece, coming, stage);
            });
            piece = coming;
        }
        block.each_warpgroup([&](auto& group) { forget(block, parts(group.index)); });
        block.each_warpgroup([&](auto& group) {
            const SsdPart& part = parts(group.index);
            if (part.channels == 0) return;
            group.each(
                [&](int thread, Registers& r) { this->leave(part, piece.sequence, thread, r); });
        });
    }

    /// What depends on these is worked out again where it is used.
    template <class Block>
    static SSM_DEVICE void forget(Block& block, SsdPart& part) {
        block.forget();
        part.row = fresh(part.row), part.head = fresh(part.head);
        part.first_channel = fresh(part.first_channel);
    }

    template <class Block, class Parts>
    SSM_DEVICE void fetch(Block& block, Parts& parts, const SsdPiece& piece, int stage) const {
        block.each([&](int thread, Registers&) {
            const int group = thread / kWarpgroup;
            const SsdPart& part = parts(group);
            // All of the block will wait for these numbers, to cut the next tile.
            const std::int64_t later = piece.begin + kSsdTile + thread;
            if (kPacked && thread < kSsdTile && later < in.seqlen)
                block.touch(sequence_place(in, part.row, later));
            fetch_rows<Element, kStates, kThreads>(block, thread, C_of(stage), in.C, in.copies_C,
                                                   part.row, quotient(part.head, in.group_heads_C),
                                                   0, in.dstate, piece);
            fetch_rows<Element, kStates, kThreads>(block, thread, B_of(stage), in.B, in.copies_B,
                                                   part.row, quotient(part.head, in.group_heads_B),
                                                   0, in.dstate, piece);
            if (part.channels == 0) return;
            fetch_rows<Element, kSsdChannels, kWarpgroup>(
                block, thread % kWarpgroup, X_of(stage, group), in.X, in.copies_X, part.row,
                part.head, part.first_channel, part.channels, piece);
        });
    }

    /// Where in a warpgroup the accumulators of a thread are: the first row, and the first column.
    static SSM_DEVICE int channel_of(unsigned thread) {
        return static_cast<int>(thread / kWarp * 16 + thread % kWarp / 4);
    }
    static SSM_DEVICE int step_of(unsigned thread) { return static_cast<int>(thread % 4 * 2); }

    /// Everything that one piece is for.
    template <class Block, class Group>
    SSM_DEVICE void walk(Block& block, Group& group, SsdPart& part, const SsdPiece& piece,
                         const SsdPiece& coming, int stage) const {
        const auto states = [&](int thread) -> auto& { return group.registers(thread).h; };
        const auto sums = [&](int thread) -> auto& { return group.registers(thread).s; };
        const int decays = group.index * kDecays;
        if (piece.starts) {
            group.each(
                [&](int thread, Registers& r) { this->end_sequence(part, piece, thread, r); });
            forget(block, part);  // places of one state in memory are not kept for the other
            group.each(
                [&](int thread, Registers& r) { this->begin_sequence(part, piece, thread, r); });
            forget(block, part);
        }
        begin_product<kStates, false>(group, false, sums, C_of(stage), B_of(stage));
        group.each_warp([&](auto& warp) {
            if (warp.index % 4 == 0) {
                write_decays<Real>(
                    block, warp, in, part.head, piece,
                    [&](int lane) -> auto& { return warp.registers(lane).raw; }, decays);
                warp.each([&](int lane, Registers& r) {
                    fetch_steps(in, part.row, part.head, coming, lane, r.raw);
                    SSM_UNROLL
                    for (int step = 2 * lane; step < 2 * lane + 2; ++step) {
                        const Real upto = exp2_of(block.read(decays + SsdDecays::kHigh + step) +
                                                  block.read(decays + SsdDecays::kLow + step));
                        block.write(decays + kUpto + step,
                                    kPacked && !piece.has(step) ? Real(-1) : upto);
                    }
                });
            }
        });
        group.barrier();
        finish_products<0>(group, sums);
        group.each([&](int thread, Registers& r) {
            weigh(block, M_of(group.index), decays, thread, r);
            block.fence_for_products();
        });
        group.barrier();
        // Half of many states at a time: the others would take registers.
        SSM_UNROLL
        for (int first = 0; first < kStates; first += 64) {
            group.each([&](int, Registers& r) { settle(r.h); });
            begin_product<64, false>(
                group, first > 0, sums,
                [&](int thread, int k) {
                    const auto& h = group.registers(thread).h;
                    return left_of<Element>(h[(first + k) / 8], h[(first + k) / 8 + 1]);
                },
                Swizzled{C_of(stage).place + first / 64 * Swizzled::kSlab});
            finish_products<0>(group, sums);
        }
        group.each_warp([&](auto& warp) {
            SSM_UNROLL
            for (int k = 0; k < kSsdTile / 16; ++k)
                load_left<true>(warp, X_of(stage, group.index), warp.index % 4 * 16, k * 16,
                                [&](int lane) -> auto& { return warp.registers(lane).x[k]; });
        });
        group.each([&](int thread, Registers& r) { scale_y(block, decays, thread, r); });
        begin_product<kSsdTile, false>(
            group, true, sums, [&](int thread, int k) { return group.registers(thread).x[k / 16]; },
            M_of(group.index));
        finish_products<0>(group, sums);
        group.each([&](int thread, Registers& r) { decay_states(block, decays, thread, r); });
        begin_product<kSsdTile, true>(
            group, true, states,
            [&](int thread, int k) { return group.registers(thread).x[k / 16]; }, B_of(stage));
        forget(block, part);
        store(block, group, part, piece, stage);
        finish_products<0>(group, states);
    }

    /// Writes M: the steps of a thread as reached from the steps of S that come before the last
    /// one of its warp.
    template <class Block>
    SSM_DEVICE void weigh(Block& block, const Swizzled& M, int decays, int thread,
                          Registers& r) const {
        const int to = channel_of(thread);
        Real high[2], low[2];
        SSM_UNROLL
        for (int row = 0; row < 2; ++row) {
            high[row] = block.read(decays + SsdDecays::kHigh + to + 8 * row);
            low[row] = block.read(decays + SsdDecays::kLow + to + 8 * row);
        }
        SSM_UNROLL
        for (int n = 0; n < kSsdTile / 8; ++n) {
            const int from = 8 * n + step_of(thread);
            auto& s = r.s[n];
            if (n / 2 <= thread / kWarp) {
                Real from_high[2], from_low[2], size[2];
                block.read2(decays + SsdDecays::kHigh + from, from_high);
                block.read2(decays + SsdDecays::kLow + from, from_low);
                block.read2(decays + SsdDecays::kStep + from, size);
                SSM_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const Real decay =
                        decay_between(high[i / 2], low[i / 2], from_high[i % 2], from_low[i % 2]);
                    // Chosen, not multiplied by 0: the decay from a later step may be infinite.
                    s[i] = from + i % 2 <= to + i / 2 * 8 ? s[i] * decay * size[i % 2] : Real(0);
                }
            } else {
                SSM_UNROLL
                for (int i = 0; i < 4; ++i) s[i] = 0;
            }
            block.write_pair(M.at(to, from), operand<Element>(s[0], s[1]));
            block.write_pair(M.at(to + 8, from), operand<Element>(s[2], s[3]));
        }
    }

    /// Y^T = Y^T e + D X^T.
    template <class Block>
    SSM_DEVICE void scale_y(Block& block, int decays, int thread, Registers& r) const {
        const int channel = decays + kD + channel_of(thread);
        const Real skip[2] = {block.read(channel), block.read(channel + 8)};
        SSM_UNROLL
        for (int n = 0; n < kSsdTile / 8; ++n) {
            Real upto[2];
            block.read2(decays + kUpto + 8 * n + step_of(thread), upto);
            SSM_UNROLL
            for (int row = 0; row < 2; ++row) {
                const auto pair = r.x[n / 2].of[n % 2 * 2 + row];
                Real(&s)[4] = r.s[n];
                s[2 * row] = s[2 * row] * upto[0] + skip[row] * first_of(pair);
                s[2 * row + 1] = s[2 * row + 1] * upto[1] + skip[row] * second_of(pair);
            }
        }
    }

    /// H = decay H, and w X^T in place of X^T.
    template <class Block>
    SSM_DEVICE void decay_states(Block& block, int decays, int thread, Registers& r) const {
        const Real decay = exp2_of(block.read(decays + SsdDecays::kHigh + kSsdTile - 1) +
                                   block.read(decays + SsdDecays::kLow + kSsdTile - 1));
        SSM_UNROLL
        for (int i = 0; i < kStates / 2; ++i) r.h[i / 4][i % 4] *= decay;
        SSM_UNROLL
        for (int half = 0; half < kSsdTile / 8; ++half) {
            Real w[2];
            block.read2(decays + SsdDecays::kLeft + 8 * half + step_of(thread), w);
            SSM_UNROLL
            for (int row = 0; row < 2; ++row) {
                auto& pair = r.x[half / 2].of[half % 2 * 2 + row];
                pair = operand<Element>(first_of(pair) * w[0], second_of(pair) * w[1]);
            }
        }
    }

    /// y = y silu(z), in memory.
    template <class Block, class Group>
    SSM_DEVICE void store(Block& block, Group& group, const SsdPart& part, const SsdPiece& piece,
                          int stage) const {
        group.each([&](int thread, Registers& r) {
            if (in.z)
                each_output(part, piece, in.z, thread, [&](int n, int i, std::int64_t offset) {
                    r.s[n][i] *= silu(in.z.template load<Real>(offset));
                });
            if (kPacked) clear_skipped(block, group.index * kDecays, thread, r);
            if (!stages_y)
                each_output(part, piece, y, thread,
                            [&](int n, int i, std::int64_t offset) { y.store(offset, r.s[n][i]); });
        });
        if (!stages_y) return;
        // X is in registers: y takes its place, and leaves in rows.
        const Swizzled rows = X_of(stage, group.index);
        group.each_warp([&](auto& warp) {
            SSM_UNROLL
            for (int n = 0; n < kSsdTile / 8; n += 2)
                warp.template store<true>(
                    [&](int lane) {
                        return rows.at(8 * n + lane / 16 * 8 + lane % 8,
                                       warp.index % 4 * 16 + lane / 8 % 2 * 8);
                    },
                    [&](int lane) {
                        Fragment<Element> made;
                        SSM_UNROLL
                        for (int m = 0; m < 4; ++m) {
                            const auto& s = warp.registers(lane).s[n + m / 2];
                            made.of[m] = pair_of<Element>(s[m % 2 * 2], s[m % 2 * 2 + 1]);
                        }
                        return made;
                    });
        });
        group.barrier();
        group.each([&](int thread, Registers&) {
            using Eight = Pack<Element, 8>;
            const int first = thread / 8, column = thread % 8 * 8;
            Element* to = static_cast<Element*>(y.data) + part.row * y.stride[0] +
                          (piece.begin + first) * y.stride[1] + part.head * y.stride[2] +
                          part.first_channel + column;
            if (column >= part.channels) return;
            SSM_UNROLL
            for (int step = first; step < first + kSsdTile; step += kWarpgroup / 8) {
                if (step < piece.steps) {
                    *reinterpret_cast<Eight*>(to) =
                        block.template read_pack<Eight>(rows.at(step, column));
                }
                to += kWarpgroup / 8 * y.stride[1];
            }
        });
    }

    /// y = 0 where a step is skipped, whatever D and z made of it.
    template <class Block>
    SSM_DEVICE void clear_skipped(Block& block, int decays, int thread, Registers& r) const {
        SSM_UNROLL
        for (int n = 0; n < kSsdTile / 8; ++n) {
            Real upto[2];
            block.read2(decays + kUpto + 8 * n + step_of(thread), upto);
            SSM_UNROLL
            for (int i = 0; i < 4; ++i)
                if (upto[i % 2] < 0) r.s[n][i] = 0;
        }
    }

    /// Calls use(n, i, offset) for the elements of a tensor (B, L, H, P) that belong to the
    /// accumulators [n][i] of Y^T of a thread and exist.
    template <class Use>
    SSM_DEVICE void each_output(const SsdPart& part, const SsdPiece& piece, const Plane<4>& tensor,
                                int thread, Use&& use) const {
        const int channel = channel_of(thread), first = step_of(thread);
        std::int64_t offset =
            part.row * tensor.stride[0] + (piece.begin + first) * tensor.stride[1] +
            part.head * tensor.stride[2] + (part.first_channel + channel) * tensor.stride[3];
        SSM_UNROLL
        for (int n = 0; n < kSsdTile / 8; ++n) {
            SSM_UNROLL
            for (int i = 0; i < 4; ++i)
                if (8 * n + first + i % 2 < piece.steps && channel + i / 2 * 8 < part.channels)
                    use(n, i, offset + i % 2 * tensor.stride[1] + i / 2 * 8 * tensor.stride[3]);
            offset += 8 * tensor.stride[1];
            keep_order();
        }
    }
};

template <class Element, int kStates>
void start(const SsdInputs& in, const Share& share, std::int64_t blocks,
           const SsdChunkScanArgs& args, const Exec& exec) {
    const auto run = [&](auto packed) {
        ForwardOnHopper<Element, kStates, packed()> kernel{{}, share};
        kernel.chain(in, args, exec);
        kernel.stages_y = args.y.dtype == args.X.dtype && in_packs(args.y, 3, 8);
        run_ssd_chain<float>(kernel, args, blocks, exec);
    };
    in.seq_idx.data ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace

bool starts_on_hopper(const SsdInputs& in, const SsdChunkScanArgs& args, const Exec& exec) {
    if (in.segments > 1 || in.dstate > 128) return false;
    if (in.heads * in.headdim * in.seqlen == 0) return false;
    for (const TensorView* states : {&args.initial_states, &args.final_states})
        if (states->ndim != kAbsent && states->dtype != DType::f32) return false;
    const Share share(in);
    const std::int64_t blocks = in.batch * (in.heads / share.heads) * share.blocks;
    // A block fills a multiprocessor: fewer of them than those of an H100 would leave some idle,
    // and one slab that shares with no other, two warpgroups of three.
    const bool is_worth = in.dstate > 32 && share.slabs > 1 && blocks >= 132;
    if (!has_warpgroups(args.X.device, is_worth)) return false;
    const auto run = [&](auto element) {
        using Element = decltype(element);
        in.dstate <= 64 ? start<Element, 64>(in, share, blocks, args, exec)
                        : start<Element, 128>(in, share, blocks, args, exec);
        return true;
    };
    if (args.X.dtype == DType::bf16) return run(Bf16{});
    return args.X.dtype == DType::f16 && run(F16{});
}

}  // namespace ssm::cuda
