// LayerNorm and RMSNorm in groups, times a gate, forward and backward. A task owns some rows; a
// group stays in the first-level cache between its passes. docs/ops/gated_norm.md#algorithm
#include <ssm/gated_norm.h>

#include <cmath>

#include "../op/scratch.h"
#include "gate.h"
#include "rows.h"

namespace ssm::cpu::SSM_ISA {

namespace {

/// The sizes of a walk along groups of rows.
struct GroupShape : RowShape {
    std::int64_t size;    // of a group
    std::int64_t groups;  // per row

    explicit GroupShape(const GatedNormArgs& args)
        : RowShape(args.x), size(args.group_size), groups(size == dim ? 1 : dim / size) {}
    template <class T, class E>
    bool streams(const TensorView& out) const {
        return size % kStreamed<T, E> == 0 && RowShape::streams<T, E>(out);
    }
};

// Forward ---------------------------------------------------------------------------------------

/// Writes s = x silu(z) to `line` and returns the sum of s, or of its squares.
template <class T, class E>
T gate_values(const E* x, const E* z, T* line, std::int64_t size, bool squares) {
    Sums<T, kGates> sums;
    sweep<T, kGates>(size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto s = take<T>(x + i, piece) * silu(take<T>(z + i, piece));
        put<T>(line + i, s, piece);
        sums.add(squares ? s * s : s);
    });
    return sums.total();
}

/// Returns the sum of s, or of its squares.
template <class T, class E>
T sum_values(const E* s, std::int64_t size, bool squares) {
    Sums<T, kSums> sums;
    sweep<T, kSums>(size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto v = take<T>(s + i, piece);
        sums.add(squares ? v * v : v);
    });
    return sums.total();
}

template <class T, class E>
T squared_deviations(const E* s, T mean, std::int64_t size) {
    Sums<T, kSums> sums;
    sweep<T, kSums>(size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto d = inside(take<T>(s + i, piece) - mean, piece);
        sums.add(d * d);
    });
    return sums.total();
}

template <class T>
struct Statistics {
    T mean;
    T rstd;
};

/// The statistics of s, given its sum, or for RMSNorm that of its squares.
template <class T, class E>
Statistics<T> statistics(const E* s, T total, std::int64_t size, bool is_rms, T eps) {
    const T count = static_cast<T>(max(size, 1));
    const T mean = is_rms ? T(0) : total / count;
    const T squares = is_rms ? total : squared_deviations<T>(s, mean, size);
    return {mean, T(1) / std::sqrt(squares / count + eps)};
}

/// y = ((s - mean) rstd weight + bias) silu(z), or without z; bias may be null.
template <bool kGate, class T, class S, class E>
void scale_group(const S* s, const Statistics<T>& of, const T* weight, const T* bias, const E* z,
                 E* y, std::int64_t size, bool past_caches, const Ahead<E>& next_x,
                 const Ahead<E>& next_z) {
    sweep<T, kGates>(size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next_x.template fetch<T>(i, piece);
        next_z.template fetch<T>(i, piece);
        auto v = (take<T>(s + i, piece) - of.mean) * of.rstd * take<T>(weight + i, piece);
        if (bias != nullptr) v = v + take<T>(bias + i, piece);
        if constexpr (kGate) v = v * silu(take<T>(z + i, piece));
        put_past<T>(y + i, v, piece, past_caches);
    });
}

template <class T, class E>
void forward(const GatedNormArgs& args, int wanted_threads) {
    const GroupShape shape(args);
    const std::int64_t dim = shape.dim, size = shape.size, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(pitch * (2 + 4 * threads)));
    T* const memory = static_cast<T*>(scratch.data());
    const T* const weight = dense(args.weight, memory, dim);
    const T* const bias = dense(args.bias, memory + pitch, dim);
    const bool past_caches = shape.streams<T, E>(args.y);
    const bool gate_first = args.z.ndim >= 0 && !args.norm_before_gate;
    const std::int64_t rows_per_task = max(1, kTaskElements / max(dim, 1));
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const T eps = static_cast<T>(args.eps);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (2 + 4 * thread);
        const auto line = [&](int k) { return reinterpret_cast<E*>(lines + k * pitch); };
        const RowLines<E> x(args.x, line(1), dim), z(args.z, line(2), dim), y(args.y, line(3), dim);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const Ahead next_x(x, row + 1, end), next_z(z, row + 1, end);
            const E* const from = x.read(row);
            const E* const gate = z.given() ? z.read(row) : nullptr;
            E* const out = y.place(row);
            for (std::int64_t group = 0; group < shape.groups; ++group) {
                const std::int64_t at = group * size;
                const T* const b = bias == nullptr ? nullptr : bias + at;
                Statistics<T> of;
                if (gate_first) {
                    const T total = gate_values(from + at, gate + at, lines, size, args.is_rms);
                    of = statistics<T>(lines, total, size, args.is_rms, eps);
                    scale_group<false>(lines, of, weight + at, b, gate, out + at, size, past_caches,
                                       next_x.at(at), next_z.at(at));
                } else {
                    const T total = sum_values<T>(from + at, size, args.is_rms);
                    of = statistics<T>(from + at, total, size, args.is_rms, eps);
                    if (gate == nullptr)
                        scale_group<false>(from + at, of, weight + at, b, gate, out + at, size,
                                           past_caches, next_x.at(at), next_z.at(at));
                    else
                        scale_group<true>(from + at, of, weight + at, b, gate + at, out + at, size,
                                          past_caches, next_x.at(at), next_z.at(at));
                }
                const std::int64_t index = row * shape.groups + group;
                if (args.mean.ndim >= 0) *statistic<T>(args.mean, index) = of.mean;
                if (args.rstd.ndim >= 0) *statistic<T>(args.rstd, index) = of.rstd;
            }
            y.write(row, out);
        }
        if (past_caches) end_streams();
    });
}

// Backward --------------------------------------------------------------------------------------

/// One group of one row. z and dz may be null, and so may what is not wanted or not given.
template <class T, class E>
struct GroupGrad {
    const E* x;
    const E* z;
    const E* dy;
    const T* weight;
    const T* bias;
    Statistics<T> of;
    E* dx;
    E* dz;
    T* dweight;
    T* dbias;
    T* scaled;   // scratch: the gradient of what was normalised
    T* sigmoid;  // scratch
    std::int64_t size;
    bool is_rms;
    bool stream_dx;
    bool stream_dz;
};

/// ds = (g - mean(g) - xhat mean(g xhat)) rstd as slope (s - mean) + rstd g + constant.
template <class T>
struct Line {
    T slope;
    T constant;
};

template <class T, class E, int kWidth>
Line<T> line_of(const GroupGrad<T, E>& at, const Sums<T, kWidth>& gx, const Sums<T, kWidth>& g) {
    const T share = at.of.rstd / static_cast<T>(at.size);
    return {-at.of.rstd * share * gx.total(), at.is_rms ? T(0) : -share * g.total()};
}

/// The gradient of xhat weight + bias, added to dweight and dbias; returns that of xhat.
template <class T, class E, class Piece, int kCount>
SSM_INLINE Pack<T, kCount> project(const GroupGrad<T, E>& at, std::int64_t i, Piece piece,
                                   const Pack<T, kCount>& d, const Pack<T, kCount>& xhat) {
    if (at.dweight != nullptr)
        put<T>(at.dweight + i, take<T>(at.dweight + i, piece) + d * xhat, piece);
    if (at.dbias != nullptr) put<T>(at.dbias + i, take<T>(at.dbias + i, piece) + d, piece);
    return d * take<T>(at.weight + i, piece);
}

/// y = (xhat weight + bias) silu(z), or y = xhat weight + bias without z.
template <bool kGate, class T, class E>
void grad_norm_first(const GroupGrad<T, E>& given, const Ahead<E>& next_x, const Ahead<E>& next_z,
                     const Ahead<E>& next_dy) {
    // A copy that nothing can point to: stores do not make it be read again.
    const GroupGrad<T, E> at = given;
    Sums<T, kGates> gx, g;
    sweep<T, kGates>(at.size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto xhat = inside((take<T>(at.x + i, piece) - at.of.mean) * at.of.rstd, piece);
        auto d = take<T>(at.dy + i, piece);
        if constexpr (kGate) {
            const auto z = take<T>(at.z + i, piece);
            const auto s = sigmoid_factor(z), q = z * s;
            auto v = xhat * take<T>(at.weight + i, piece);
            if (at.bias != nullptr) v = v + take<T>(at.bias + i, piece);
            put_past<T>(at.dz + i, d * v * silu_slope(q, s), piece, at.stream_dz);
            d = d * q;
        }
        const auto scaled = project(at, i, piece, d, xhat);
        put<T>(at.scaled + i, scaled, piece);
        gx.add(scaled * xhat);
        g.add(scaled);
    });
    const Line<T> line = line_of(at, gx, g);
    sweep<T, kStores>(at.size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next_x.template fetch<T>(i, piece);
        next_z.template fetch<T>(i, piece);
        next_dy.template fetch<T>(i, piece);
        auto v = take<T>(at.scaled + i, piece) * at.of.rstd + line.constant;
        v = v + (take<T>(at.x + i, piece) - at.of.mean) * line.slope;
        put_past<T>(at.dx + i, v, piece, at.stream_dx);
    });
}

/// y = xhat weight + bias, where xhat normalises s = x silu(z).
template <class T, class E>
void grad_gate_first(const GroupGrad<T, E>& given, const Ahead<E>& next_x, const Ahead<E>& next_z,
                     const Ahead<E>& next_dy) {
    // A copy that nothing can point to: stores do not make it be read again.
    const GroupGrad<T, E> at = given;
    Sums<T, kGates> gx, g;
    sweep<T, kGates>(at.size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        const auto z = take<T>(at.z + i, piece);
        const auto s = sigmoid_factor(z);
        put<T>(at.sigmoid + i, s, piece);
        const auto gated = take<T>(at.x + i, piece) * (z * s);
        const auto xhat = inside((gated - at.of.mean) * at.of.rstd, piece);
        const auto scaled = project(at, i, piece, take<T>(at.dy + i, piece), xhat);
        put<T>(at.scaled + i, scaled, piece);
        gx.add(scaled * xhat);
        g.add(scaled);
    });
    const Line<T> line = line_of(at, gx, g);
    sweep<T, kGates>(at.size, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next_x.template fetch<T>(i, piece);
        next_z.template fetch<T>(i, piece);
        next_dy.template fetch<T>(i, piece);
        const auto x = take<T>(at.x + i, piece), s = take<T>(at.sigmoid + i, piece);
        const auto q = take<T>(at.z + i, piece) * s;
        auto v = take<T>(at.scaled + i, piece) * at.of.rstd + line.constant;
        v = v + (x * q - at.of.mean) * line.slope;
        put_past<T>(at.dx + i, v * q, piece, at.stream_dx);
        put_past<T>(at.dz + i, v * x * silu_slope(q, s), piece, at.stream_dz);
    });
}

template <class T, class E>
void backward(const GatedNormArgs& args, const GatedNormGrads& grads, int wanted_threads) {
    const GroupShape shape(args);
    const std::int64_t dim = shape.dim, size = shape.size, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    // The cut depends on the sizes only, and so do the sums.
    const std::int64_t most = max(1, min(kPartials, kPartialElements / max(dim, 1)));
    const std::int64_t rows_per_task = max(1, (shape.rows + most - 1) / most);
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const bool has_dweight = grads.dweight.ndim >= 0, has_dbias = grads.dbias.ndim >= 0;
    const Scratch scratch(sizeof(T) *
                          static_cast<std::size_t>(pitch * (2 + 7 * threads + 2 * tasks)));
    T* const memory = static_cast<T*>(scratch.data());
    T* const partials = memory + pitch * (2 + 7 * threads);
    const T* const weight = dense(args.weight, memory, dim);
    const T* const bias = dense(args.bias, memory + pitch, dim);
    const bool gate_first = args.z.ndim >= 0 && !args.norm_before_gate;
    const bool stream_dx = shape.streams<T, E>(grads.dx), stream_dz = shape.streams<T, E>(grads.dz);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (2 + 7 * thread);
        const auto line = [&](int k) { return reinterpret_cast<E*>(lines + k * pitch); };
        const RowLines<E> x(args.x, line(2), dim), z(args.z, line(3), dim),
            dy(grads.dy, line(4), dim);
        const RowLines<E> dx(grads.dx, line(5), dim), dz(grads.dz, line(6), dim);
        T* const dweight = has_dweight ? partials + pitch * task : nullptr;
        T* const dbias = has_dbias ? partials + pitch * (tasks + task) : nullptr;
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(dim);
        if (has_dweight) std::memset(dweight, 0, bytes);
        if (has_dbias) std::memset(dbias, 0, bytes);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const Ahead next_x(x, row + 1, end), next_z(z, row + 1, end), next_dy(dy, row + 1, end);
            GroupGrad<T, E> at{.x = x.read(row),
                               .z = z.given() ? z.read(row) : nullptr,
                               .dy = dy.read(row),
                               .weight = weight,
                               .bias = bias,
                               .of = {},
                               .dx = dx.place(row),
                               .dz = z.given() ? dz.place(row) : nullptr,
                               .dweight = dweight,
                               .dbias = dbias,
                               .scaled = lines,
                               .sigmoid = lines + pitch,
                               .size = size,
                               .is_rms = args.is_rms,
                               .stream_dx = stream_dx,
                               .stream_dz = stream_dz};
            E *const to_x = at.dx, *const to_z = at.dz;
            for (std::int64_t group = 0; group < shape.groups; ++group) {
                const std::int64_t index = row * shape.groups + group;
                at.of = {args.is_rms ? T(0) : *statistic<T>(args.mean, index),
                         *statistic<T>(args.rstd, index)};
                const Ahead<E> ahead_x = next_x.at(group * size), ahead_z = next_z.at(group * size),
                               ahead_dy = next_dy.at(group * size);
                if (gate_first)
                    grad_gate_first(at, ahead_x, ahead_z, ahead_dy);
                else if (at.z != nullptr)
                    grad_norm_first<true>(at, ahead_x, ahead_z, ahead_dy);
                else
                    grad_norm_first<false>(at, ahead_x, ahead_z, ahead_dy);
                at.x += size;
                at.dy += size;
                at.dx += size;
                at.weight += size;
                if (at.z != nullptr) at.z += size, at.dz += size;
                if (at.bias != nullptr) at.bias += size;
                if (at.dweight != nullptr) at.dweight += size;
                if (at.dbias != nullptr) at.dbias += size;
            }
            dx.write(row, to_x);
            if (z.given()) dz.write(row, to_z);
        }
        if (stream_dx || stream_dz) end_streams();
    });
    reduce_partials(grads.dweight, partials, pitch, tasks, dim, threads);
    reduce_partials(grads.dbias, partials + pitch * tasks, pitch, tasks, dim, threads);
}

}  // namespace

void gated_norm_fwd(const GatedNormArgs& args, int threads) {
    visit_rows({&args.x, &args.z, &args.y}, [&](auto* acc, auto* element) {
        forward<std::decay_t<decltype(*acc)>, std::decay_t<decltype(*element)>>(args, threads);
    });
}

void gated_norm_bwd(const GatedNormArgs& args, const GatedNormGrads& grads, int threads) {
    visit_rows({&args.x, &args.z, &grads.dy, &grads.dx, &grads.dz}, [&](auto* acc, auto* element) {
        backward<std::decay_t<decltype(*acc)>, std::decay_t<decltype(*element)>>(args, grads,
                                                                                 threads);
    });
}

}  // namespace ssm::cpu::SSM_ISA
