// The thread block of block.cuh, executed by the host in tests: thread after thread, with every
// access to shared memory checked.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.cuh"

namespace ssm::cuda {

/// Where an execution stands: what a memory needs to tell right from wrong.
struct Progress {
    int thread = 0;
    std::int64_t epoch = 1;  // barriers so far
};

/// Shared memory of one type. Between two barriers no thread may read what another one wrote, nor
/// write what another one read or wrote, nor anyone read what was never written. What is being
/// copied may not be touched at all.
template <class Value>
class CheckedMemory {
  public:
    CheckedMemory(const char* kind, std::int64_t size, const Progress& now)
        : kind_(kind), size_(size), cells_(new Cell[static_cast<std::size_t>(size)]), now_(now) {}

    Value read(int place) {
        Cell& cell = at(place);
        if (cell.copying) fault("read before it is copied", place);
        if (cell.written == 0) fault("read before written", place);
        if (cell.written == now_.epoch && cell.writer != now_.thread)
            fault("read in a race", place);
        cell.reader =
            cell.read == now_.epoch && cell.reader != now_.thread ? kSeveral : now_.thread;
        cell.read = now_.epoch;
        return cell.value;
    }

    void write(int place, Value value) {
        Cell& cell = at(place);
        if (cell.copying) fault("written while it is copied to", place);
        if (cell.written == now_.epoch && cell.writer != now_.thread) fault("written twice", place);
        if (cell.read == now_.epoch && cell.reader != now_.thread)
            fault("written in a race", place);
        cell = {value, now_.thread, cell.reader, now_.epoch, cell.read, false};
    }

    void begin_copy(int place, Value value) {
        write(place, value);
        at(place).copying = true;
    }
    void end_copy(int place) {
        Cell& cell = at(place);
        cell.copying = false;
        cell.written = now_.epoch;
    }

    [[noreturn]] void fault(const char* what, int place) const {
        throw std::logic_error(std::string(kind_) + " memory " + what + ": place " +
                               std::to_string(place) + " of " + std::to_string(size_) +
                               ", thread " + std::to_string(now_.thread));
    }

  private:
    static constexpr int kSeveral = -2;
    struct Cell {
        Value value{};
        int writer = -1, reader = -1;
        std::int64_t written = 0, read = 0;  // epochs
        bool copying = false;
    };

    Cell& at(int place) {
        if (place < 0 || place >= size_) fault("out of bounds", place);
        return cells_[static_cast<std::size_t>(place)];
    }

    const char* kind_;
    std::int64_t size_;
    std::unique_ptr<Cell[]> cells_;
    const Progress& now_;
};

inline int fresh(int thread) { return thread; }

template <class Value>
struct PerLane {
    Value values[kWarp] = {};
    Value& operator()(int lane) { return values[lane]; }
};

template <class Block>
class Warp {
  public:
    using Real = typename Block::RealType;
    using Element = typename Block::ElementType;

    Warp(Block& block, int index) : index(index), block_(block) {}

    const int index;

    auto& registers(int lane) { return block_.registers_[index * kWarp + lane]; }

    template <class Phase>
    void each(Phase&& phase) {
        ++block_.phases_;
        for (int i = 0; i < kWarp; ++i) {
            const int lane = block_.phases_ % 2 == 0 ? i : kWarp - 1 - i;
            block_.now_.thread = index * kWarp + lane;
            phase(lane, registers(lane));
        }
    }

    template <class Get>
    void prefix_sum(Get&& get) {
        for (int offset = 1; offset < kWarp; offset *= 2)
            for (int lane = kWarp - 1; lane >= offset; --lane) get(lane) += get(lane - offset);
    }

    template <class Get>
    void broadcast(int lane, Get&& get) {
        const auto value = get(lane);
        for (int other = 0; other < kWarp; ++other) get(other) = value;
    }

    template <bool kTransposed, class Place, class Get>
    void load(Place&& place_of, Get&& get) {
        for (int row = 0; row < kWarp; ++row) {
            const int place = place_of(row);
            if (place % 8 != 0) block_.matrices_.fault("read in rows at an odd address", place);
            // The banks are as wide as 16 bytes times 8: rows of one matrix lie in unlike ones.
            for (int other = row / 8 * 8; sizeof(Element) == 2 && other < row; ++other)
                if (place_of(other) / 8 % 8 == place / 8 % 8 && place_of(other) != place)
                    block_.matrices_.fault("read in rows of one bank", place);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            block_.now_.thread = index * kWarp + lane;
            for (int m = 0; m < 4; ++m) {
                Element found[2];
                for (int i = 0; i < 2; ++i) {
                    const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
                    const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
                    found[i] = block_.matrices_.read(place_of(8 * m + row) + column);
                }
                get(lane).of[m] = __builtin_bit_cast(Pair<Element>, found);
            }
        }
    }

  private:
    Block& block_;
};

/// Runs the phases of one block in turn.
template <class Kernel, class Real>
class Block {
  public:
    using RealType = Real;
    using ElementType = typename MatrixElement<Kernel>::Type;

    explicit Block(const Kernel& kernel)
        : shared_("shared", kernel.shared_size(), now_),
          matrices_("matrix", MatrixElement<Kernel>::size(kernel), now_) {
        if (MatrixElement<Kernel>::size(kernel) * sizeof(ElementType) % 16 != 0)
            matrices_.fault("has a size that is no multiple of 16 bytes", 0);
    }

    template <class Phase>
    void each(Phase&& phase) {
        // Half of the phases run backwards: the order of threads must not matter.
        ++phases_;
        for (int i = 0; i < Kernel::kThreads; ++i) {
            now_.thread = phases_ % 2 == 0 ? i : Kernel::kThreads - 1 - i;
            phase(now_.thread, registers_[now_.thread]);
        }
    }
    template <class Phase>
    void each_warp(Phase&& phase) {
        constexpr int kWarps = Kernel::kThreads / kWarp;
        const bool backwards = ++phases_ % 2 != 0;
        for (int i = 0; i < kWarps; ++i) {
            Warp<Block> warp(*this, backwards ? kWarps - 1 - i : i);
            phase(warp);
        }
    }

    void barrier() { ++now_.epoch; }
    void forget() {}

    template <class Says>
    std::uint32_t vote(Says&& says) {
        std::uint32_t first = 0;
        for (int base = 0; base < Kernel::kThreads; base += kWarp) {
            std::uint32_t bits = 0;
            for (int lane = 0; lane < kWarp; ++lane) {
                now_.thread = base + lane;
                if (says(now_.thread)) bits |= std::uint32_t{1} << lane;
            }
            if (base == 0) first = bits;
            if (bits != first) throw std::logic_error("vote with unlike results of two warps");
        }
        return first;
    }

    Real read(int place) { return shared_.read(place); }
    void write(int place, Real value) { shared_.write(place, value); }
    void read4(int place, Real (&values)[4]) {
        if (place % 4 != 0) shared_.fault("read four at an odd address", place);
        for (int i = 0; i < 4; ++i) values[i] = read(place + i);
    }

    ElementType read_element(int place) { return matrices_.read(place); }
    void write_element(int place, ElementType value) { matrices_.write(place, value); }
    Pair<ElementType> read_pair(int place) {
        if (place % 2 != 0) matrices_.fault("read in pairs at an odd address", place);
        const ElementType found[2] = {matrices_.read(place), matrices_.read(place + 1)};
        return __builtin_bit_cast(Pair<ElementType>, found);
    }
    void write_pair(int place, Pair<ElementType> pair) {
        if (place % 2 != 0) matrices_.fault("written in pairs at an odd address", place);
        struct Two {
            ElementType of[2];
        };
        const Two two = __builtin_bit_cast(Two, pair);
        for (int i = 0; i < 2; ++i) matrices_.write(place + i, two.of[i]);
    }

    void copy(int place, const ElementType* from, bool exists) {
        constexpr int kCount = 16 / sizeof(ElementType);
        if (place % kCount != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
            matrices_.fault("copied to or from an odd address", place);
        for (int i = 0; i < kCount; ++i) {
            matrices_.begin_copy(place + i, exists ? from[i] : ElementType{});
            copies_.push_back({now_.thread, committed_[now_.thread], place + i});
        }
    }
    void commit_copies(int thread) { ++committed_[thread]; }
    void wait_for_copies(int thread, bool all = true) {
        const int end = all ? committed_[thread] + 1 : committed_[thread] - 1;
        std::size_t kept = 0;
        for (const auto& copy : copies_)
            if (copy.thread == thread && copy.group < end)
                matrices_.end_copy(copy.place);
            else
                copies_[kept++] = copy;
        copies_.resize(kept);
    }

    template <int kLanes, int kStride = 1, class Get>
    void sum_lanes(Get&& get) {
        for (int offset = kStride; offset < kStride * kLanes; offset *= 2) sum_pairs(offset, get);
    }
    template <class Get>
    void sum_lanes(int lanes, Get&& get) {
        for (int offset = 1; offset < lanes; offset *= 2) sum_pairs(offset, get);
    }

    template <int kValues, int kLanes, int kStride, class Get>
    void scatter_sums(Get&& get) {
        for (int lanes = kLanes / 2, half = kValues / 2; lanes > 0; lanes /= 2, half /= 2) {
            for (int t = 0; t < Kernel::kThreads; ++t) {
                if (t & lanes * kStride) continue;
                Real(&low)[kValues] = get(registers_[t]);
                Real(&high)[kValues] = get(registers_[t + lanes * kStride]);
                for (int i = 0; i < half; ++i) {
                    low[i] += high[i];
                    high[i] = high[i + half] + low[i + half];
                }
            }
        }
    }

  private:
    friend class Warp<Block>;

    template <class Get>
    void sum_pairs(int offset, Get&& get) {
        for (int t = 0; t < Kernel::kThreads; ++t) {
            if (t & offset) continue;
            Real &low = get(registers_[t]), &high = get(registers_[t + offset]);
            low = high = low + high;
        }
    }

    struct Copy {
        int thread, group, place;
    };

    Progress now_;
    CheckedMemory<Real> shared_;
    CheckedMemory<ElementType> matrices_;
    std::vector<Copy> copies_;
    int committed_[Kernel::kThreads] = {};  // groups
    typename Kernel::Registers registers_[Kernel::kThreads] = {};
    std::int64_t phases_ = 0;
};

}  // namespace ssm::cuda
