// What the norms share: statistics of groups of columns, and the walks of both directions along
// rows, with sums along them and over them.
#pragma once

#include "numerics.cuh"
#include "rows.cuh"

namespace ssm::cuda {

constexpr int kRowWarps = kRowThreads / 32;

/// Blocks among which the rows of a sum over rows are cut. A number of its own, not the device's,
/// so that no result depends on the device.
constexpr std::int64_t kRowBlocks = 264;

/// Sums kValues registers over the threads of each group; all of these get the sums. Uses the
/// places [place, place + kValues * kRowWarps) of shared memory, which nobody touched since a
/// barrier.
template <int kValues, class Block, class Get>
SSM_DEVICE void sum_groups(Block& block, int place, const RowCut& cut, Get&& get) {
    SSM_UNROLL
    for (int v = 0; v < kValues; ++v)
        block.template sum_lanes<32>([&](auto& r) -> auto& { return get(r)[v]; });
    const int warps = cut.lanes / 32;
    if (warps == 1) return;
    block.each([&](int thread, auto& r) {
        if (thread % 32 != 0) return;
        SSM_UNROLL
        for (int v = 0; v < kValues; ++v)
            block.write(place + v * kRowWarps + thread / 32, get(r)[v]);
    });
    block.barrier();
    block.each([&](int thread, auto& r) {
        const int warp = thread % kRowWarps, first = cut.slot(thread) * warps;
        SSM_UNROLL
        for (int v = 0; v < kValues; ++v)
            get(r)[v] = warp < warps ? block.read(place + v * kRowWarps + first + warp) : 0;
    });
    SSM_UNROLL
    for (int v = 0; v < kValues; ++v)
        block.template sum_lanes<kRowWarps>([&](auto& r) -> auto& { return get(r)[v]; });
}

/// How rows are cut among blocks where sums over rows are wanted. A block walks `steps` sets of
/// slots rows in one group, and leaves one row of partial sums, which AddPartials adds in order.
struct RowSums {
    std::int64_t steps, chunks;

    explicit RowSums(const RowCut& cut) {
        const std::int64_t sets = (cut.rows + cut.slots - 1) / cut.slots;
        steps = (sets * cut.groups + kRowBlocks - 1) / kRowBlocks;
        chunks = steps > 0 ? (sets + steps - 1) / steps : 0;
    }
};

/// The sums of a thread for the gradients of weight and bias.
template <class Real>
struct VectorSums {
    Real dweight[kRowElements], dbias[kRowElements];

    SSM_DEVICE void clear() {
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) dweight[e] = dbias[e] = 0;
    }
    /// d: the gradient of xhat weight + bias.
    SSM_DEVICE void add(int e, Real d, Real xhat) {
        dweight[e] += d * xhat;
        dbias[e] += d;
    }
};

/// Where blocks leave these sums: (chunks, columns) each, null where not wanted.
template <class Real>
struct Partials {
    Real *dweight, *dbias;
    std::int64_t columns;

    /// Both directions between memory and registers, for groups that these do not hold as a whole.
    template <int kWidth>
    SSM_DEVICE void load(std::int64_t chunk, const RowPart& part, VectorSums<Real>& sums) const {
        each<kWidth>(chunk, part, sums, [](Real& memory, Real& sum) { sum = memory; });
    }
    template <int kWidth>
    SSM_DEVICE void store(std::int64_t chunk, const RowPart& part, VectorSums<Real>& sums) const {
        each<kWidth>(chunk, part, sums, [](Real& memory, Real& sum) { memory = sum; });
    }

    /// Leaves over_rows of the threads of a block: the sums of its slots one after the other, in
    /// shared memory from `place` on.
    template <int kWidth, class Block>
    SSM_DEVICE void leave(Block& block, int place, const RowCut& cut, std::int64_t chunk,
                          std::int64_t group) const {
        for (int slot = 0; slot < cut.slots; ++slot) {
            if (slot > 0) block.barrier();
            block.each([&](int thread, auto& r) {
                if (cut.slot(thread) != slot) return;
                VectorSums<Real>& sums = r.over_rows;
                const int own = place + cut.lane(thread);
                SSM_UNROLL
                for (int e = 0; e < kRowElements; ++e) {
                    const int at = own + 2 * e * cut.lanes;
                    if (slot > 0) {
                        sums.dweight[e] += block.read(at);
                        sums.dbias[e] += block.read(at + cut.lanes);
                    }
                    if (slot + 1 == cut.slots) continue;
                    block.write(at, sums.dweight[e]);
                    block.write(at + cut.lanes, sums.dbias[e]);
                }
                if (slot + 1 == cut.slots)
                    store<kWidth>(chunk, cut.part<kWidth>(0, group, 0, thread), sums);
            });
        }
    }
    static std::int64_t shared_size(const RowCut& cut) {
        return cut.slots > 1 ? 2 * cut.slab_size : 0;
    }

  private:
    template <int kWidth, class Move>
    SSM_DEVICE void each(std::int64_t chunk, const RowPart& part, VectorSums<Real>& sums,
                         Move&& move) const {
        const std::int64_t first = chunk * columns + part.column;
        SSM_UNROLL
        for (int e = 0; e < kRowElements; ++e) {
            const int place = e / kWidth * part.stride + e % kWidth;
            if (place >= part.left) continue;
            if (dweight != nullptr) move(dweight[first + place], sums.dweight[e]);
            if (dbias != nullptr) move(dbias[first + place], sums.dbias[e]);
        }
    }
};

/// What a thread keeps in the forward: its part of s, what is normalised, and its group's
/// statistics.
template <class Real>
struct NormRegisters {
    Real s[kRowElements];
    Real sum[1];
    Real mean, rstd;
};

/// s becomes (s - mean) rstd weight + bias; bias may be absent.
template <class X, class Real>
SSM_DEVICE void scale_part(NormRegisters<Real>& r, const Plane<1>& weight, const Plane<1>& bias,
                           const RowPart& part) {
    SSM_UNROLL
    for (int k = 0; k < kRowElements / X::kWidth; ++k) {
        const auto w = vector_piece<Real, X>(weight, part, k);
        SSM_UNROLL
        for (int i = 0; i < X::kWidth; ++i) {
            Real& s = r.s[k * X::kWidth + i];
            s = (s - r.mean) * r.rstd * w.of[i];
        }
        if (!bias) continue;
        const auto b = vector_piece<Real, X>(bias, part, k);
        SSM_UNROLL
        for (int i = 0; i < X::kWidth; ++i) r.s[k * X::kWidth + i] += b.of[i];
    }
}

/// The same in the backward; g is the gradient of xhat = (s - mean) rstd.
template <class Real>
struct NormGradRegisters {
    Real g[kRowElements];
    VectorSums<Real> over_rows;
    Real sum[2];  // of g xhat and of g; then their means
    Real mean, rstd;

    SSM_DEVICE void add(int e, Real xhat) {
        sum[0] += g[e] * xhat;
        sum[1] += g[e];
    }
    /// The gradient of s.
    SSM_DEVICE Real gradient(int e, Real xhat) const {
        return (g[e] - sum[1] - xhat * sum[0]) * rstd;
    }
};

/// The statistics of groups, and how both directions walk along rows of type X. Without kGroups a
/// row is one group.
template <class Real, bool kGroups>
struct Norm {
    RowCut cut;
    Plane<1> mean, rstd;  // (M)
    bool is_rms;
    Real eps;

    static constexpr int kForwardShared = 2 * kRowWarps;
    static constexpr int kBackwardShared = 4 * kRowWarps;

    std::int64_t forward_blocks() const {
        return (cut.rows * cut.groups + cut.slots - 1) / cut.slots;
    }

    /// load(part, registers) makes s, store(part, registers) uses it once with the statistics.
    template <class X, class Block, class Load, class Store>
    SSM_DEVICE void forward(Block& block, std::int64_t index, Load&& load, Store&& store) const {
        using Slab = std::conditional_t<kAnySize<X>, int, std::int64_t>;  // int: no spills
        const Slab slabs = kAnySize<X> ? static_cast<Slab>(cut.slabs) : 1;
        const auto unit_of = [&](int thread) { return index * cut.slots + cut.slot(thread); };
        const auto part = [&](int thread, Slab slab) {
            const std::int64_t unit = unit_of(thread);
            const std::int64_t row = kGroups ? quotient(unit, cut.groups) : unit;
            const std::int64_t group = kGroups ? unit - row * cut.groups : 0;
            return cut.template part<X::kWidth>(row, group, slab, thread);
        };
        const auto sum = [](auto& r) -> Real(&)[1] { return r.sum; };
        const Real share = Real(1) / static_cast<Real>(cut.size > 0 ? cut.size : 1);

        block.each([&](int, auto& r) { r.sum[0] = 0; });
        for (Slab slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, auto& r) {
                load(part(thread, slab), r);
                SSM_UNROLL
                for (int e = 0; e < kRowElements; ++e)
                    r.sum[0] += is_rms ? r.s[e] * r.s[e] : r.s[e];
            });
        sum_groups<1>(block, 0, cut, sum);
        block.each([&](int, auto& r) { r.mean = is_rms ? Real(0) : r.sum[0] * share; });
        if (!is_rms) {
            // A second pass: the mean of squares less the square of the mean would lose digits.
            block.each([&](int, auto& r) { r.sum[0] = 0; });
            for (Slab slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, auto& r) {
                    const RowPart at = part(thread, slab);
                    if (slabs > 1) load(at, r);
                    SSM_UNROLL
                    for (int e = 0; e < kRowElements; ++e) {
                        const bool exists = e / X::kWidth * at.stride + e % X::kWidth < at.left;
                        const Real deviation = exists ? r.s[e] - r.mean : Real(0);
                        r.sum[0] += deviation * deviation;
                    }
                });
            sum_groups<1>(block, kRowWarps, cut, sum);
        }
        block.each([&](int thread, auto& r) {
            r.rstd = rsqrt_of(r.sum[0] * share + eps);
            const std::int64_t unit = unit_of(thread);
            if (cut.lane(thread) != 0 || unit >= cut.rows * cut.groups) return;
            if (mean) mean.store(unit * mean.stride[0], r.mean);
            if (rstd) rstd.store(unit * rstd.stride[0], r.rstd);
        });
        for (Slab slab = 0; slab < slabs; ++slab)
            block.each([&](int thread, auto& r) {
                if (slabs > 1) load(part(thread, slab), r);
                store(part(thread, slab), r);
            });
    }

    /// The rows of one chunk, in one group. enter(part, registers, first) makes g, and if `first`
    /// adds to all sums; store(part, registers) uses it once with the means.
    template <class X, class Block, class Enter, class Store>
    SSM_DEVICE void backward(Block& block, std::int64_t index, const RowSums& over,
                             const Partials<Real>& partials, Enter&& enter, Store&& store) const {
        constexpr int kWidth = X::kWidth;
        using Slab = std::conditional_t<kAnySize<X>, int, std::int64_t>;  // int: no spills
        const Slab slabs = kAnySize<X> ? static_cast<Slab>(cut.slabs) : 1;
        const std::int64_t chunk = kGroups ? quotient(index, cut.groups) : index;
        const std::int64_t group = kGroups ? index - chunk * cut.groups : 0;
        const Real share = Real(1) / static_cast<Real>(cut.size);
        block.each([&](int, auto& r) { r.over_rows.clear(); });
        for (Slab step = 0; step < static_cast<Slab>(over.steps); ++step) {
            const std::int64_t first = opaque((chunk * over.steps + step) * cut.slots);
            const auto part = [&](int thread, Slab slab) {
                return cut.template part<kWidth>(first + cut.slot(thread), group, slab, thread);
            };
            block.each([&](int thread, auto& r) {
                const std::int64_t row = first + cut.slot(thread);
                const std::int64_t unit = kGroups ? row * cut.groups + group : row;
                const bool exists = row < cut.rows;
                r.mean = exists && !is_rms ? mean.template load<Real>(unit * mean.stride[0]) : 0;
                r.rstd = exists ? rstd.template load<Real>(unit * rstd.stride[0]) : 0;
                r.sum[0] = r.sum[1] = 0;
            });
            for (Slab slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, auto& r) {
                    const RowPart at = part(thread, slab);
                    if (slabs > 1) {
                        r.over_rows.clear();
                        if (step > 0) partials.template load<kWidth>(chunk, at, r.over_rows);
                    }
                    enter(at, r, std::true_type());
                    if (slabs > 1) partials.template store<kWidth>(chunk, at, r.over_rows);
                });
            sum_groups<2>(block, step % 2 * 2 * kRowWarps, cut,
                          [](auto& r) -> Real(&)[2] { return r.sum; });
            block.each([&](int, auto& r) {
                r.sum[0] *= share;
                r.sum[1] = is_rms ? Real(0) : r.sum[1] * share;
            });
            for (Slab slab = 0; slab < slabs; ++slab)
                block.each([&](int thread, auto& r) {
                    const RowPart at = part(thread, slab);
                    // Rows of any layout need the registers for addresses.
                    if constexpr (kAnySize<X>) enter(at, r, std::false_type());
                    store(at, r);
                });
        }
        if (slabs == 1) partials.template leave<kWidth>(block, kBackwardShared, cut, chunk, group);
    }
};

/// out = the sum of `count` rows, each of `columns` numbers.
template <class Real>
struct AddPartials {
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerUnit = 4;
    static constexpr int kTile = 32, kParts = kThreads / kTile;
    struct Registers {};

    const Real* partials;
    std::int64_t count, columns;
    Plane<1> out;

    std::int64_t shared_size() const { return kThreads; }

    template <class Block>
    SSM_DEVICE void operator()(Block& block, std::int64_t index) const {
        block.each([&](int thread, Registers&) {
            const std::int64_t column = index * kTile + thread % kTile;
            Real sum = 0;
            if (column < columns)
                for (std::int64_t row = thread / kTile; row < count; row += kParts)
                    sum += partials[row * columns + column];
            block.write(thread, sum);
        });
        block.barrier();
        block.each([&](int thread, Registers&) {
            const std::int64_t column = index * kTile + thread;
            if (thread >= kTile || column >= columns) return;
            Real sum = 0;
            SSM_UNROLL
            for (int part = 0; part < kParts; ++part) sum += block.read(part * kTile + thread);
            out.store(column * out.stride[0], sum);
        });
    }
};

/// Calls start(partials) with the working memory of the call, then adds what blocks left there.
template <class Real, class Start>
void with_partials(const char* op, const RowCut& cut, const TensorView& dweight,
                   const TensorView& dbias, const Exec& exec, const Device& device, Start&& start) {
    const std::int64_t columns = cut.groups * cut.size, chunks = RowSums(cut).chunks;
    Real* const memory = static_cast<Real*>(exec.workspace);
    const auto place_of = [&](const TensorView& out, int which) {
        return out.ndim == kAbsent ? nullptr : memory + which * chunks * columns;
    };
    const Partials<Real> partials{place_of(dweight, 0), place_of(dbias, 1), columns};
    start(partials);
    const auto add = [&](const Real* sums, const TensorView& out) {
        if (sums == nullptr) return;
        const AddPartials<Real> kernel{sums, chunks, columns, plane<1>(out)};
        launch<Real>(op, kernel, (columns + kernel.kTile - 1) / kernel.kTile, device, exec);
    };
    add(partials.dweight, dweight);
    add(partials.dbias, dbias);
}

/// Bytes of this working memory.
inline std::int64_t partials_size(const RowCut& cut, DType main) {
    const std::int64_t size = main == DType::f64 ? sizeof(double) : sizeof(float);
    return 2 * RowSums(cut).chunks * cut.groups * cut.size * size;
}

}  // namespace ssm::cuda
