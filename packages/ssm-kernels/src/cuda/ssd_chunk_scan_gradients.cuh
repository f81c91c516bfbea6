// The gradients of the state-space dual scan in a tile, given the state that enters it and the
// gradient of the one that leaves it. A block owns a tile of one row and a slice of the heads that
// share B and C, and adds the gradients of B and C over its heads before they go to memory.
#pragma once

#include "ssd_chunk_scan_output.cuh"

namespace ssm::cuda {

template <class Real, class Matter, int kStates>
struct SsdDifferentiate : SsdOutputGradients<Real, Matter, kStates> {
    using Base = SsdOutputGradients<Real, Matter, kStates>;
    using Base::in, Base::out, Base::window, Base::kThreads;
    using typename Base::Element, typename Base::Registers, typename Base::Sums;
    static constexpr int kBlocksPerUnit = 1;

    std::int64_t blocks() const {
        const std::int64_t left = out.tiles - window * out.window_tiles;
        return in.batch * out.slices * (left < out.window_tiles ? left : out.window_tiles);
    }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        SsdShare share = ssd_share(in, out, window, index, kStates);
        std::int64_t begin = std::int64_t{share.tile} * kSsdTile, end = begin + kSsdTile;
        end = end < in.seqlen ? end : in.seqlen;
        while (begin < end) {
            // A walk of its own for every piece: it need not stay in registers.
            const SsdPiece piece = SsdWalk<Real, false>(out, share.row, begin, end).next(block, in);
            begin = piece.begin + piece.steps;
            share.is_last = begin == end;
            differentiate(block, share, piece);
            block.barrier();
            share.is_first = false;
        }
    }

  private:
    template <class Block>
    SSM_DEVICE void differentiate(Block& block, const SsdShare& share,
                                  const SsdPiece& piece) const {
        this->multiply_steps(block, share, piece);
        for (int own = 0; own < share.slabs; ++own) {
            if (own > 0) this->fetch_groups(block, share, piece, own);
            this->clear_gradients(block);
            for (int h = 0; h < share.heads; ++h) {
                SsdPart part{};
                part.row = share.row, part.head = share.first_head + h;
                // The sums of a head without channels are zero, and wanted.
                const int slabs = in.slabs > 1 ? static_cast<int>(in.slabs) : 1;
                for (int slab = 0; slab < slabs; ++slab) {
                    part.first_channel = std::int64_t{slab} * kSsdChannels;
                    const std::int64_t left = in.headdim - part.first_channel;
                    part.channels = static_cast<int>(left < kSsdChannels ? left : kSsdChannels);
                    block.each([&](int thread, Registers& r) {
                        fetch_head(block, share, part, piece, own > 0 ? own : share.slabs - 1,
                                   fresh(thread), r);
                    });
                    if (slab == 0) write_decays_of(block, part, piece);
                    Base::arrive(block);
                    if (own == 0) this->differentiate_pairs(block, slab > 0);
                    Base::forget(block);
                    if (own == 0) this->multiply_states(block, share, part, piece);
                    Base::forget(block);
                    this->add_state_gradients(block, piece);
                    Base::forget(block);
                    if (own == 0) this->differentiate_channels(block, share, part, piece, slab > 0);
                    block.barrier();
                }
                if (own == 0) finish_head(block, share, part, piece);
            }
            this->add_step_gradients(block);
            this->store_gradients(block, share, piece, own);
            if (own + 1 < share.slabs) block.barrier();
        }
    }

    /// What belongs to a head and a slab of its channels, and one slab of its states.
    template <class Block>
    SSM_DEVICE void fetch_head(Block& block, const SsdShare& share, const SsdPart& part,
                               const SsdPiece& piece, int slab, int thread, Registers& r) const {
        fetch_rows<Element, kSsdChannels, kThreads>(block, thread, Base::X_of(), in.X, in.copies_X,
                                                    part.row, part.head, part.first_channel,
                                                    part.channels, piece);
        fetch_output_gradients<Element, kThreads>(block, thread, Base::dY_of(), in, out, part,
                                                  piece);
        this->fetch_states(block, share, part, piece, slab, thread);
        if (thread < kWarp && part.first_channel == 0)
            fetch_steps(in, part.row, part.head, piece, thread, r.raw);
        if (thread < kSsdChannels)
            block.write(Base::kD + thread, in.D && thread < part.channels
                                               ? in.D.template load<Real>(
                                                     part.head * in.D.stride[0] +
                                                     (part.first_channel + thread) * in.D.stride[1])
                                               : Real(0));
    }

    template <class Block>
    SSM_DEVICE void write_decays_of(Block& block, const SsdPart& part,
                                    const SsdPiece& piece) const {
        block.each_warp([&](auto& warp) {
            if (warp.index == 0)
                write_all_decays<Real>(block, warp, in, part.head, piece,
                                       [&](int lane) -> auto& { return warp.registers(lane).raw; });
        });
    }

    /// ddt of a head, and its shares of dA and ddt_bias.
    template <class Block>
    SSM_DEVICE void finish_head(Block& block, const SsdShare& share, const SsdPart& part,
                                const SsdPiece& piece) const {
        block.each_warp([&](auto& warp) {
            if (warp.index == 0) Sums::sum_along(block, warp);
        });
        block.each(
            [&](int thread, Registers& r) { r.through = Sums::crossing(block, fresh(thread)); });
        block.template sum_lanes<4>([](Registers& r) -> Real& { return r.through; });
        block.each([&](int thread, Registers& r) {
            if (thread % 4 == 0) block.write(Sums::kCrossing + thread / 4, r.through);
        });
        block.barrier();
        block.each([&](int thread, Registers& r) {
            Sums::finish_step(block, in, out, part, piece, fresh(thread), r);
        });
        block.template sum_lanes<kWarp>([](Registers& r) -> Real& { return r.dA; });
        block.template sum_lanes<kWarp>([](Registers& r) -> Real& { return r.dbias; });
        block.each([&](int thread, Registers& r) {
            if (thread >= kSsdTile || thread % kWarp != 0) return;
            const std::int64_t place =
                ((share.row * out.tiles + share.tile) * kSsdHalves + thread / kWarp) * in.heads +
                part.head;
            out.dA[place] = share.is_first ? r.dA : out.dA[place] + r.dA;
            if (out.dbias != nullptr)
                out.dbias[place] = share.is_first ? r.dbias : out.dbias[place] + r.dbias;
        });
        block.barrier();
    }
};

}  // namespace ssm::cuda
