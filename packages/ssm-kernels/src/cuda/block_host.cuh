// The thread block of block.cuh, executed by the host in tests: thread after thread, with every
// access to shared memory checked.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.cuh"

namespace ssm::cuda {

/// Where an execution stands: what a memory needs to tell right from wrong.
struct Progress {
    int thread = 0;
    std::int64_t epoch = 1;        // barriers of the block so far
    std::int64_t group_epoch = 0;  // barriers of the warpgroup of the thread since then
};

/// Shared memory of one type. Between two barriers no thread may read what another one wrote, nor
/// write what another one read or wrote, nor anyone read what was never written. What is being
/// copied may not be touched at all. A product of a warpgroup reads by the asynchronous proxy: what
/// threads wrote, it sees after a fence of theirs and a barrier, and until the warpgroup has waited
/// for the product nobody may write it.
template <class Value>
class CheckedMemory {
  public:
    CheckedMemory(const char* kind, std::int64_t size, const Progress& now, bool has_products)
        : kind_(kind),
          size_(size),
          cells_(new Cell[static_cast<std::size_t>(size)]),
          now_(now),
          has_products_(has_products) {}

    Value read(int place) {
        Cell& cell = at(place);
        if (cell.copying) fault("read before it is copied", place);
        if (cell.written.epoch == 0) fault("read before written", place);
        if (races(cell.written)) fault("read in a race", place);
        mark_read(cell, now_.thread);
        return cell.value;
    }

    void write(int place, Value value) {
        Cell& cell = at(place);
        if (cell.copying) fault("written while it is copied to", place);
        if (cell.products != 0) fault("written while a product reads it", place);
        if (races(cell.written)) fault("written twice", place);
        if (races(cell.read)) fault("written in a race", place);
        cell.value = value;
        mark_written(cell, place);
    }

    void begin_copy(int place, Value value) {
        write(place, value);
        at(place).copying = true;
    }
    void end_copy(int place) {
        Cell& cell = at(place);
        cell.copying = false;
        mark_written(cell, place);
    }

    /// What this thread has written until now can be seen by products after the next barrier.
    void fence() {
        for (const int place : unfenced_[now_.thread]) {
            Cell& cell = at(place);
            if (cell.copying || cell.written.who != now_.thread) continue;
            cell.written = {now_.thread, now_.epoch, now_.group_epoch};
            cell.fenced = true;
        }
        unfenced_[now_.thread].clear();
    }
    Value begin_product(int place) {
        Cell& cell = at(place);
        if (cell.copying) fault("read by a product before it is copied", place);
        if (cell.written.epoch == 0) fault("read by a product before written", place);
        if (!cell.fenced) fault("read by a product without a fence behind its writer", place);
        if (races(cell.written) || is_now(cell.written, now_.thread))
            fault("read by a product in a race", place);
        ++cell.products;
        return cell.value;
    }
    void end_product(int place) {
        Cell& cell = at(place);
        --cell.products;
        mark_read(cell, several_of(now_.thread / kWarpgroup));
    }

    [[noreturn]] void fault(const char* what, int place) const {
        throw std::logic_error(std::string(kind_) + " memory " + what + ": place " +
                               std::to_string(place) + " of " + std::to_string(size_) +
                               ", thread " + std::to_string(now_.thread));
    }

  private:
    /// A thread, several threads of one warpgroup, or threads of several; and when.
    struct Access {
        int who = kNobody;
        std::int64_t epoch = 0, group_epoch = 0;
    };
    struct Cell {
        Value value{};
        Access written, read;
        int products = 0;  // that read it
        bool copying = false, fenced = false;
    };

    static constexpr int kNobody = -1, kAll = -2;
    static int several_of(int group) { return -3 - group; }
    static int group_of(int who) {
        return who >= 0 ? who / kWarpgroup : who > several_of(0) ? -1 : -3 - who;
    }

    /// Whether an access by `who` lies before the same barrier as now.
    bool is_now(const Access& access, int who) const {
        return access.epoch == now_.epoch &&
               (group_of(access.who) != group_of(who) || access.group_epoch == now_.group_epoch);
    }
    bool races(const Access& access) const {
        return access.who != now_.thread && is_now(access, now_.thread);
    }
    void mark_read(Cell& cell, int who) {
        if (cell.read.epoch == now_.epoch && cell.read.who != who) {
            const int group = group_of(who);
            if (group_of(cell.read.who) != group)
                who = kAll;
            else if (cell.read.group_epoch == now_.group_epoch)
                who = several_of(group);
        }
        cell.read = {who, now_.epoch, now_.group_epoch};
    }
    void mark_written(Cell& cell, int place) {
        cell.written = {now_.thread, now_.epoch, now_.group_epoch};
        cell.fenced = false;
        if (has_products_) unfenced_[now_.thread].push_back(place);
    }

    Cell& at(int place) {
        if (place < 0 || place >= size_) fault("out of bounds", place);
        return cells_[static_cast<std::size_t>(place)];
    }

    const char* kind_;
    std::int64_t size_;
    std::unique_ptr<Cell[]> cells_;
    const Progress& now_;
    bool has_products_;
    std::map<int, std::vector<int>> unfenced_;  // places, by the thread that wrote them
};

inline int fresh(int thread) { return thread; }

template <class Value>
struct PerLane {
    Value values[kWarp] = {};
    Value& operator()(int lane) { return values[lane]; }
};

template <class Value>
struct PerWarpgroup {
    Value values[1024 / kWarpgroup] = {};
    Value& operator()(int group) { return values[group]; }
};

[[noreturn]] inline void stop() { throw std::logic_error("kernel of another architecture"); }

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
            block_.become(index * kWarp + lane);
            phase(lane, registers(lane));
        }
    }

    template <class Get>
    void prefix_sum(Get&& get) {
        for (int offset = 1; offset < kWarp; offset *= 2)
            for (int lane = kWarp - 1; lane >= offset; --lane) get(lane) += get(lane - offset);
    }

    template <class Get>
    void shift(Get&& get) {
        for (int lane = kWarp - 1; lane > 0; --lane) get(lane) = get(lane - 1);
        get(0) = 0;
    }

    template <class Get>
    void broadcast(int lane, Get&& get) {
        const auto value = get(lane);
        for (int other = 0; other < kWarp; ++other) get(other) = value;
    }

    template <bool kTransposed, class Place, class Get>
    void store(Place&& place_of, Get&& get) {
        for (int row = 0; row < kWarp; ++row) check_row(place_of, row);
        for (int lane = 0; lane < kWarp; ++lane) {
            block_.become(index * kWarp + lane);
            for (int m = 0; m < 4; ++m) {
                struct Two {
                    Element of[2];
                };
                const Two two = __builtin_bit_cast(Two, get(lane).of[m]);
                for (int i = 0; i < 2; ++i) {
                    const int row = kTransposed ? 2 * (lane % 4) + i : lane / 4;
                    const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
                    block_.matrices_.write(place_of(8 * m + row) + column, two.of[i]);
                }
            }
        }
    }

    template <bool kTransposed, class Place, class Get>
    void load(Place&& place_of, Get&& get) {
        for (int row = 0; row < kWarp; ++row) check_row(place_of, row);
        for (int lane = 0; lane < kWarp; ++lane) {
            block_.become(index * kWarp + lane);
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
    template <class Place>
    void check_row(Place&& place_of, int row) const {
        const int place = place_of(row);
        if (place % 8 != 0) block_.matrices_.fault("read in rows at an odd address", place);
        // The banks are as wide as 16 bytes times 8: rows of one matrix lie in unlike ones.
        for (int other = row / 8 * 8; sizeof(Element) == 2 && other < row; ++other)
            if (place_of(other) / 8 % 8 == place / 8 % 8 && place_of(other) != place)
                block_.matrices_.fault("read in rows of one bank", place);
    }

    Block& block_;
};

template <class Block>
class Warpgroup {
  public:
    using Real = typename Block::RealType;
    using Element = typename Block::ElementType;

    Warpgroup(Block& block, int index) : index(index), block_(block) {}

    const int index;

    auto& registers(int thread) { return block_.registers_[index * kWarpgroup + thread]; }

    template <class Phase>
    void each(Phase&& phase) {
        ++block_.phases_;
        for (int i = 0; i < kWarpgroup; ++i) {
            const int thread = block_.phases_ % 2 == 0 ? i : kWarpgroup - 1 - i;
            block_.become(index * kWarpgroup + thread);
            phase(thread, registers(thread));
        }
    }
    template <class Phase>
    void each_warp(Phase&& phase) {
        constexpr int kWarps = kWarpgroup / kWarp;
        const bool backwards = ++block_.phases_ % 2 != 0;
        for (int i = 0; i < kWarps; ++i) {
            Warp<Block> warp(block_, index * kWarps + (backwards ? kWarps - 1 - i : i));
            phase(warp);
        }
    }
    void barrier() { ++block_.group_epochs_[index]; }

    /// The element that a product finds at an address in bytes, until the product has been waited
    /// for.
    Element begin_product(std::uint32_t address, std::vector<int>& places) {
        block_.become(index * kWarpgroup);
        places.push_back(static_cast<int>(address / sizeof(Element)));
        return block_.matrices_.begin_product(places.back());
    }
    /// Ends a group of products; `deliver` runs when they have been waited for.
    void commit_products(std::vector<int> places, std::function<void()> deliver) {
        block_.products_[index].push_back({std::move(places), std::move(deliver)});
    }
    /// Waits for all groups of products but the last `pending`.
    void wait_for_products(int pending) {
        auto& queue = block_.products_[index];
        const auto end = static_cast<std::ptrdiff_t>(queue.size()) - pending;
        block_.become(index * kWarpgroup);
        for (std::ptrdiff_t i = 0; i < end; ++i) {
            for (const int place : queue[i].places) block_.matrices_.end_product(place);
            queue[i].deliver();
        }
        if (end > 0) queue.erase(queue.begin(), queue.begin() + end);
    }
    std::uint32_t address_of(int place) const { return block_.address_of(place); }
    [[noreturn]] void fault(const char* what) const { block_.matrices_.fault(what, 0); }

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
        : shared_("shared", kernel.shared_size(), now_, false),
          matrices_("matrix", MatrixElement<Kernel>::size(kernel), now_, kHasProducts<Kernel>) {
        if (MatrixElement<Kernel>::size(kernel) * sizeof(ElementType) % 16 != 0)
            matrices_.fault("has a size that is no multiple of 16 bytes", 0);
    }

    template <class Phase>
    void each(Phase&& phase) {
        // Half of the phases run backwards: the order of threads must not matter.
        ++phases_;
        for (int i = 0; i < Kernel::kThreads; ++i) {
            become(phases_ % 2 == 0 ? i : Kernel::kThreads - 1 - i);
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

    template <class Phase>
    void each_warpgroup(Phase&& phase) {
        constexpr int kGroups = Kernel::kThreads / kWarpgroup;
        const bool backwards = ++phases_ % 2 != 0;
        for (int i = 0; i < kGroups; ++i) {
            Warpgroup<Block> group(*this, backwards ? kGroups - 1 - i : i);
            phase(group);
            if (!products_[group.index].empty()) group.fault("left with products under way");
        }
    }

    void barrier() {
        ++now_.epoch;
        for (std::int64_t& epoch : group_epochs_) epoch = 0;
    }
    void forget() {}

    template <class Says>
    std::uint32_t vote(Says&& says) {
        std::uint32_t first = 0;
        for (int base = 0; base < Kernel::kThreads; base += kWarp) {
            std::uint32_t bits = 0;
            for (int lane = 0; lane < kWarp; ++lane) {
                become(base + lane);
                if (says(now_.thread)) bits |= std::uint32_t{1} << lane;
            }
            if (base == 0) first = bits;
            if (bits != first) throw std::logic_error("vote with unlike results of two warps");
        }
        return first;
    }

    Real read(int place) { return shared_.read(place); }
    void write(int place, Real value) { shared_.write(place, value); }
    void read2(int place, Real (&values)[2]) {
        if (place % 2 != 0) shared_.fault("read two at an odd address", place);
        for (int i = 0; i < 2; ++i) values[i] = read(place + i);
    }
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

    template <class Pack>
    Pack read_pack(int place) {
        Pack pack;
        if (place % Pack::kWidth != 0) matrices_.fault("read in packs at an odd address", place);
        for (int i = 0; i < Pack::kWidth; ++i) pack.of[i] = matrices_.read(place + i);
        return pack;
    }

    void fence_for_products() { matrices_.fence(); }
    std::uint32_t address_of(int place) const {
        return static_cast<std::uint32_t>(place * sizeof(ElementType));
    }

    template <class Value>
    void touch(const Value* from) {
        static_cast<void>(*static_cast<const volatile Value*>(from));
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
    friend class Warpgroup<Block>;

    void become(int thread) {
        now_.thread = thread;
        now_.group_epoch = group_epochs_[thread / kWarpgroup];
    }

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
    struct Products {
        std::vector<int> places;
        std::function<void()> deliver;
    };

    Progress now_;
    std::int64_t group_epochs_[(Kernel::kThreads + kWarpgroup - 1) / kWarpgroup] = {};
    std::vector<Products> products_[(Kernel::kThreads + kWarpgroup - 1) / kWarpgroup];
    CheckedMemory<Real> shared_;
    CheckedMemory<ElementType> matrices_;
    std::vector<Copy> copies_;
    int committed_[Kernel::kThreads] = {};  // groups
    typename Kernel::Registers registers_[Kernel::kThreads] = {};
    std::int64_t phases_ = 0;
};

}  // namespace ssm::cuda
