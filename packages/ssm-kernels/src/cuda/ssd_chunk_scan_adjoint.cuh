// Around the backward of the state-space dual scan: how its work and its working memory are cut,
// the sequences of a row from both ends, and what comes from memory and goes to it.
#pragma once

#include <numeric>

#include "ssd_chunk_scan_tile.cuh"

namespace ssm::cuda {

/// Heads whose gradients of B and C a block adds before they go to memory.
constexpr std::int64_t kSsdMostSliceHeads = 16;

/// The states of a stretch of tiles, a window, are in memory at a time. A window is as long as this
/// many bytes of states allow, within bounds.
constexpr std::int64_t kSsdWindowBytes = std::int64_t{256} << 20;
constexpr std::int64_t kSsdLeastWindowTiles = 8;
constexpr std::int64_t kSsdMostWindowTiles = 256;

/// Halves of a tile that leave their sums over steps apart: those of two warps.
constexpr int kSsdHalves = 2;

/// The gradients, how the work is cut, and the working memory.
template <class Real>
struct SsdGradients {
    Plane<4> dy, dX, dz;                      // (B, L, H, P)
    Plane<3> ddt;                             // (B, L, H)
    Plane<4> dfinal_states, dinitial_states;  // (S, H, P, N)
    bool copies_dy, packed_dX, packed_dz;

    std::int64_t tiles, window_tiles, windows;
    std::int64_t unit_heads;                        // neighbours that share both B and C
    std::int64_t unit_slices, slice_heads, slices;  // slices of a unit, heads of one, slices of all
    std::int64_t row_states;                        // elements of a saved row of a state

    std::int32_t* before;  // (B, tiles): the sequence before a tile, or -1; null without sequences
    Real* enters;          // (windows, B, H, P, N): the states that enter the windows
    Real* leaves;          // (B, H, P, N): the gradient of the state that leaves a window
    void *H, *dH;          // (window_tiles, B, H, P, row_states): into and out of each tile
    Real *dA, *dbias;      // (B, tiles, 2, H)
    Real* dD;              // (B, tiles, H, P)
    Real *dB, *dC;         // (B, slices, steps of a window, N)

    SSM_BOTH std::int64_t window_steps() const { return window_tiles * kSsdTile; }
    /// The row of states of a channel in H or dH.
    SSM_DEVICE std::int64_t state_row(const SsdInputs& in, std::int64_t tile, std::int64_t row,
                                      std::int64_t head, std::int64_t channel) const {
        return (((tile % window_tiles * in.batch + row) * in.heads + head) * in.headdim + channel) *
               row_states;
    }
};

/// What a block differentiates: a tile of one row, and a slice of its heads.
struct SsdShare {
    int row, tile, slice, first_head, group_B, group_C;
    int heads, slabs;        // slabs of states
    bool is_first, is_last;  // the piece at work is the first of its tile, the last
};

template <class Real>
SSM_DEVICE SsdShare ssd_share(const SsdInputs& in, const SsdGradients<Real>& out,
                              std::int64_t window, std::int64_t index, int slab) {
    SsdShare share{};
    const std::int64_t above = quotient(index, out.slices), tile = quotient(above, in.batch);
    const std::int64_t slice = index - above * out.slices, unit = quotient(slice, out.unit_slices);
    const std::int64_t begin = (slice - unit * out.unit_slices) * out.slice_heads;
    const std::int64_t first_head = unit * out.unit_heads + begin, heads = out.unit_heads - begin;
    share.row = static_cast<int>(above - tile * in.batch);
    share.tile = static_cast<int>(window * out.window_tiles + tile);
    share.slice = static_cast<int>(slice), share.first_head = static_cast<int>(first_head);
    share.heads = static_cast<int>(heads < out.slice_heads ? heads : out.slice_heads);
    share.group_B = static_cast<int>(quotient(first_head, in.group_heads_B));
    share.group_C = static_cast<int>(quotient(first_head, in.group_heads_C));
    share.slabs = static_cast<int>(in.dstate > slab ? (in.dstate + slab - 1) / slab : 1);
    share.is_first = true;
    return share;
}

/// Cuts the work, and the working memory into pieces; with null for memory it only counts.
template <class Real>
struct SsdWorkspace {
    char* memory;
    std::int64_t used = 0;

    template <class Value>
    Value* take(bool wanted, std::int64_t elements) {
        if (!wanted) return nullptr;
        const std::int64_t place = used;
        used += (elements * static_cast<std::int64_t>(sizeof(Value)) + 15) / 16 * 16;
        return memory == nullptr ? nullptr : reinterpret_cast<Value*>(memory + place);
    }

    template <class Element>
    void lay_out(const SsdInputs& in, SsdGradients<Real>& out) {
        const std::int64_t state_rows = in.batch * in.heads * in.headdim;
        out.row_states = (in.dstate + 7) / 8 * 8;
        out.tiles = (in.seqlen + kSsdTile - 1) / kSsdTile;
        const std::int64_t tile_bytes =
            std::max<std::int64_t>(2 * state_rows * out.row_states * sizeof(Element), 1);
        out.window_tiles =
            std::clamp(kSsdWindowBytes / tile_bytes, kSsdLeastWindowTiles, kSsdMostWindowTiles);
        out.windows =
            std::max<std::int64_t>((out.tiles + out.window_tiles - 1) / out.window_tiles, 1);
        out.window_tiles = std::max<std::int64_t>((out.tiles + out.windows - 1) / out.windows, 1);

        out.unit_heads = std::max<std::int64_t>(std::gcd(in.group_heads_B, in.group_heads_C), 1);
        out.unit_slices = (out.unit_heads + kSsdMostSliceHeads - 1) / kSsdMostSliceHeads;
        out.slice_heads = (out.unit_heads + out.unit_slices - 1) / out.unit_slices;
        out.slices = in.heads / out.unit_heads * out.unit_slices;

        const std::int64_t states = state_rows * in.dstate, parts = in.batch * out.tiles;
        const std::int64_t saved = out.window_tiles * state_rows * out.row_states;
        const std::int64_t shares = in.batch * out.slices * out.window_steps() * in.dstate;
        out.before = take<std::int32_t>(static_cast<bool>(in.seq_idx), parts);
        out.enters = take<Real>(out.windows > 1, out.windows * states);
        out.leaves = take<Real>(out.windows > 1, states);
        out.H = take<Element>(true, saved), out.dH = take<Element>(true, saved);
        out.dA = take<Real>(true, parts * kSsdHalves * in.heads);
        out.dbias = take<Real>(static_cast<bool>(in.dt_bias), parts * kSsdHalves * in.heads);
        out.dD = take<Real>(static_cast<bool>(in.D), parts * in.heads * in.headdim);
        out.dB = take<Real>(true, shares), out.dC = take<Real>(true, shares);
    }
};

// Sequences -------------------------------------------------------------------------------------

/// before[row, tile] = the sequence of the last step before the tile that is not skipped, or -1.
template <class Real>
struct SsdMarkTiles {
    static constexpr int kThreads = kWarp;
    static constexpr int kBlocksPerUnit = 1;
    struct Registers {};

    SsdInputs in;
    std::int32_t* before;
    std::int64_t tiles;

    std::int64_t shared_size() const { return 0; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t row) const {
        std::int32_t sequence = -1;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            block.each([&](int thread, Registers&) {
                if (thread == 0) before[row * tiles + tile] = sequence;
            });
            for (int half = 0; half < kSsdTile; half += kWarp) {
                const std::int64_t begin = tile * kSsdTile + half;
                const std::uint32_t valid = block.vote([&](int thread) {
                    return begin + thread < in.seqlen && sequence_at(in, row, begin + thread) >= 0;
                });
                if (valid != 0) sequence = sequence_at(in, row, begin + highest_bit(valid));
            }
        }
    }
};

/// The pieces of the steps from `begin` to `end` of a row, from the first on or from the last.
template <class Real, bool kBack>
class SsdWalk {
  public:
    SSM_DEVICE SsdWalk(const SsdGradients<Real>& out, std::int64_t row, std::int64_t begin,
                       std::int64_t end)
        : before_(out.before ? out.before + row * out.tiles : nullptr),
          row_(row),
          begin_(begin),
          end_(end) {}

    template <class Block>
    SSM_DEVICE SsdPiece next(Block& block, const SsdInputs& in) {
        SsdPiece piece{};
        piece.before = piece.sequence = before_ ? -1 : 0;
        if (begin_ == end_) return piece;
        const std::int64_t tile = (kBack ? end_ - 1 : begin_) / kSsdTile;
        const std::int64_t tile_begin = tile * kSsdTile;
        const std::int64_t ahead = end_ - tile_begin;
        const int first_step = static_cast<int>(begin_ > tile_begin ? begin_ - tile_begin : 0);
        const int end_step = static_cast<int>(ahead < kSsdTile ? ahead : kSsdTile);
        if (before_ && tile != tile_)
            marks_ = ssd_marks(block, in, row_, tile_begin, tile_begin + end_step, before_[tile]);
        tile_ = tile;
        int first = first_step, last = end_step;
        const std::uint64_t starts = marks_.starts & below(end_step) & ~below(first_step + 1);
        if (starts != 0) kBack ? first = highest_bit(starts) : last = lowest_bit(starts);
        piece.begin = tile_begin + first, piece.steps = last - first;
        piece.skipped = marks_.skipped >> first, piece.starts = marks_.starts >> first & 1;
        if (before_) {
            const auto sequence_up_to = [&](int step) {
                const std::uint64_t valid = ~marks_.skipped & below(step);
                return valid ? sequence_at(in, row_, tile_begin + highest_bit(valid))
                             : before_[tile];
            };
            piece.before = sequence_up_to(first), piece.sequence = sequence_up_to(last);
        }
        kBack ? end_ = piece.begin : begin_ = piece.begin + piece.steps;
        return piece;
    }

  private:
    /// The bits of the steps before `step`.
    static SSM_DEVICE std::uint64_t below(int step) {
        return step >= kSsdTile ? ~std::uint64_t{0} : (std::uint64_t{1} << step) - 1;
    }

    const std::int32_t* before_;
    std::int64_t row_, begin_, end_, tile_ = -1;
    SsdMarks marks_;
};

// Gradients in shared memory --------------------------------------------------------------------

/// Where the first channel of a part is in a tensor (B, L, H, P).
SSM_DEVICE std::int64_t offset_of(const Plane<4>& tensor, const SsdPart& part, std::int64_t step) {
    return part.row * tensor.stride[0] + step * tensor.stride[1] + part.head * tensor.stride[2] +
           part.first_channel * tensor.stride[3];
}

/// Brings the gradient of y before its gate: the steps of a piece and the channels of a part, as
/// fetch_rows does.
template <class Element, int kThreads, class Real, class Block>
SSM_DEVICE void fetch_output_gradients(Block& block, int thread, const Matrix& to,
                                       const SsdInputs& in, const SsdGradients<Real>& out,
                                       const SsdPart& part, const SsdPiece& piece) {
    if (!in.z)
        return fetch_rows<Element, kSsdChannels, kThreads>(block, thread, to, out.dy, out.copies_dy,
                                                           part.row, part.head, part.first_channel,
                                                           part.channels, piece);
    const auto offset = [&](const Plane<4>& tensor, int step, int channel) {
        return offset_of(tensor, part, piece.begin + step) + channel * tensor.stride[3];
    };
    SSM_ROLLED
    for (int pair = thread; pair < kSsdTile * kSsdChannels / 2; pair += kThreads) {
        const int step = pair / (kSsdChannels / 2), channel = pair % (kSsdChannels / 2) * 2;
        Real g[2] = {0, 0};
        SSM_UNROLL
        for (int i = 0; i < 2; ++i)
            if (piece.has(step) && channel + i < part.channels)
                g[i] = out.dy.template load<Real>(offset(out.dy, step, channel + i)) *
                       silu(in.z.template load<Real>(offset(in.z, step, channel + i)));
        block.write_pair(to.at(step, channel), operand<Element>(g[0], g[1]));
    }
}

/// Places beside the decays: the decay from the begin of the piece to a step.
constexpr int kSsdInto = SsdDecays::kSize;
constexpr int kSsdDecaysEnd = kSsdInto + kSsdTile;

/// write_decays, and the decays into the steps.
template <class Real, class Block, class Raw>
SSM_DEVICE void write_all_decays(Block& block, Warp<Block>& warp, const SsdInputs& in,
                                 std::int64_t head, const SsdPiece& piece, Raw&& raw) {
    write_decays<Real>(block, warp, in, head, piece, raw);
    warp.each([&](int lane, auto&) {
        SSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int step = 2 * lane + i;
            block.write(kSsdInto + step, exp2_of(block.read(SsdDecays::kHigh + step) +
                                                 block.read(SsdDecays::kLow + step)));
        }
    });
}

// States and channels ---------------------------------------------------------------------------

/// Begins to bring the saved states of the edge of a tile to a matrix (channel, state): those of
/// the channels of a part, from the state `first` on. What does not exist is zero.
template <class Element, int kStates, int kThreads, class Real, class Block>
SSM_DEVICE void copy_saved_states(Block& block, int thread, const Matrix& to, const SsdInputs& in,
                                  const SsdGradients<Real>& out, const Element* from,
                                  std::int64_t tile, const SsdPart& part, std::int64_t first) {
    constexpr int kWidth = 16 / sizeof(Element), kPerRow = kStates / kWidth;
    const std::int64_t states = out.row_states - first;
    const Element* const own =
        from + out.state_row(in, tile, part.row, part.head, part.first_channel) + first;
    SSM_UNROLL_TWICE
    for (int i = 0; i < kSsdChannels * kPerRow / kThreads; ++i) {
        const int chunk = i * kThreads + thread;
        const int channel = chunk / kPerRow, column = chunk % kPerRow * kWidth;
        const bool exists = channel < part.channels && column < states;
        block.copy(to.at(channel, column), exists ? own + channel * out.row_states + column : from,
                   exists);
    }
}

/// The same of state number `sequence` of a tensor (S, H, P, N), or 0 where none is given.
template <class Element, int kStates, int kThreads, class Block>
SSM_DEVICE void fetch_given_states(Block& block, int thread, const Matrix& to, const SsdInputs& in,
                                   const Plane<4>& states, bool given, std::int64_t sequence,
                                   const SsdPart& part, std::int64_t first) {
    using Real = typename Block::RealType;
    const std::int64_t base = sequence * states.stride[0] + part.head * states.stride[1] +
                              part.first_channel * states.stride[2] + first * states.stride[3];
    SSM_ROLLED
    for (int pair = thread; pair < kSsdChannels * kStates / 2; pair += kThreads) {
        const int channel = pair / (kStates / 2), column = pair % (kStates / 2) * 2;
        const auto value = [&](int at) {
            return given && channel < part.channels && first + at < in.dstate
                       ? states.template load<Real>(base + channel * states.stride[2] +
                                                    at * states.stride[3])
                       : Real(0);
        };
        block.write_pair(to.at(channel, column),
                         operand<Element>(value(column), value(column + 1)));
    }
}

/// The row of dB or dC of the first step of a piece and a slice of heads.
template <class Real>
SSM_DEVICE std::int64_t share_row(const SsdGradients<Real>& out, const SsdShare& share,
                                  const SsdPiece& piece, std::int64_t window) {
    return (share.row * out.slices + share.slice) * out.window_steps() + piece.begin -
           window * out.window_steps();
}

/// Stores accumulators whose first row and column are (row, state) in rows of dB or dC; 0 where a
/// step is skipped, whatever its products with states are.
template <class Real, int kCount>
SSM_DEVICE void put_share(const SsdInputs& in, const SsdPiece& piece, Real* to, int row,
                          std::int64_t state, const Real (&values)[kCount][4]) {
    SSM_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (row + half * 8 >= piece.steps) continue;
        const bool valid = piece.has(row + half * 8);
        Real* const own = to + (row + half * 8) * in.dstate + state;
        SSM_UNROLL
        for (int n = 0; n < kCount; ++n) {
            SSM_UNROLL
            for (int i = 0; i < 2; ++i)
                if (state + n * 8 + i < in.dstate)
                    own[n * 8 + i] = valid ? values[n][2 * half + i] : Real(0);
        }
    }
}

/// Calls use(n, i, element) for the elements of a tensor (B, L, H, P) that exist and belong to the
/// accumulators [n][i] whose first row and column are (row, column).
template <class Use>
SSM_DEVICE void each_channel(const SsdPart& part, const SsdPiece& piece, const Plane<4>& tensor,
                             int row, int column, Use&& use) {
    visit(tensor.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        SSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int step = row + half * 8;
            if (!piece.has(step)) continue;
            const Memory* own = static_cast<const Memory*>(tensor.data) +
                                offset_of(tensor, part, piece.begin + step) +
                                column * tensor.stride[3];
            SSM_UNROLL
            for (int n = 0; n < 4; ++n) {
                const int left = part.channels - column - n * 8;
                if (left > 0) use(n, 2 * half, own[0]);
                if (left > 1) use(n, 2 * half + 1, own[tensor.stride[3]]);
                own += 8 * tensor.stride[3];
            }
        }
    });
}

/// Stores accumulators whose first row and column are (row, column) in a tensor (B, L, H, P); 0
/// where a step is skipped.
template <class Real>
SSM_DEVICE void put_channels(const SsdPart& part, const SsdPiece& piece, const Plane<4>& to,
                             bool packed, int row, int column, const Real (&values)[4][4]) {
    visit(to.dtype, [&](auto* type) {
        using Memory = std::remove_pointer_t<decltype(type)>;
        SSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int step = row + half * 8;
            if (step >= piece.steps) continue;
            const bool valid = piece.has(step);
            Memory* const own =
                static_cast<Memory*>(to.data) + offset_of(to, part, piece.begin + step);
            SSM_UNROLL
            for (int n = 0; n < 4; ++n) {
                const int channel = column + n * 8;
                Pack<Memory, 2> pack;
                narrow(valid ? values[n][2 * half] : Real(0), pack.of[0]);
                narrow(valid ? values[n][2 * half + 1] : Real(0), pack.of[1]);
                if (packed) {
                    if (channel < part.channels)
                        *reinterpret_cast<Pack<Memory, 2>*>(own + channel) = pack;
                    continue;
                }
                SSM_UNROLL
                for (int i = 0; i < 2; ++i)
                    if (channel + i < part.channels) own[(channel + i) * to.stride[3]] = pack.of[i];
            }
        }
    });
}

}  // namespace ssm::cuda
