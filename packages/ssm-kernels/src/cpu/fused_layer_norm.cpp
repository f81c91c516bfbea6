// Residual addition with LayerNorm or RMSNorm, forward and backward. A task owns some rows; a row
// stays in the first-level cache between its passes. docs/ops/fused_layer_norm.md#algorithm
#include <ssm/fused_layer_norm.h>

#include <cmath>

#include "../op/scratch.h"
#include "rows.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Forward ---------------------------------------------------------------------------------------

/// s = x + residual (residual may be null) into `sum` and, where given, past the caches into
/// `streamed`. Returns the sum of s, or of its squares.
template <class T>
T add_rows(const T* x, const T* residual, T* sum, T* streamed, std::int64_t dim, bool squares) {
    Sums<T> sums;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) __attribute__((always_inline)) {
        Vec<T> s = take<T>(x + i, part);
        if (residual != nullptr) s += take<T>(residual + i, part);
        if (sum != nullptr) put<T>(sum + i, s, part);
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (streamed != nullptr) stream<T>(streamed + i, s);
        sums.part[slot] += squares ? s * s : s;
    });
    return sums.total();
}

template <class T>
T squared_deviations(const T* s, T mean, std::int64_t dim, const Ahead& next) {
    Sums<T> sums;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) __attribute__((always_inline)) {
        next.fetch(i);
        const Vec<T> d = inside<T>(take<T>(s + i, part) - mean, part);
        sums.part[slot] += d * d;
    });
    return sums.total();
}

/// y = (s - mean) rstd weight + bias; bias may be null.
template <class T>
void scale_row(const T* s, T mean, T rstd, const T* weight, const T* bias, T* y, std::int64_t dim,
               bool past_caches, const Ahead& next) {
    sweep<T>(dim, [&](std::int64_t i, int, auto part) __attribute__((always_inline)) {
        next.fetch(i);
        Vec<T> v = (take<T>(s + i, part) - mean) * rstd * take<T>(weight + i, part);
        if (bias != nullptr) v += take<T>(bias + i, part);
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (past_caches) return stream<T>(y + i, v);
        put<T>(y + i, v, part);
    });
}

template <class T>
void norm_rows(const FusedLayerNormArgs& args, int wanted_threads) {
    const RowShape shape(args.x);
    const std::int64_t dim = shape.dim, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(pitch * (2 + 4 * threads)));
    T* const memory = static_cast<T*>(scratch.data());
    const T* const weight = dense(args.weight, memory, dim);
    const T* const bias = dense(args.bias, memory + pitch, dim);
    const bool stream_s = args.residual.ndim >= 0 && shape.streams<T>(args.residual_out);
    const bool stream_y = shape.streams<T>(args.y);
    const std::int64_t rows_per_task = max(1, kTaskElements / max(dim, 1));
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const T count = static_cast<T>(max(dim, 1)), eps = static_cast<T>(args.eps);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (2 + 4 * thread);
        const Lines<T> x(args.x, lines, dim), residual(args.residual, lines + pitch, dim);
        const Lines<T> sum(args.residual_out, lines + 2 * pitch, dim),
            y(args.y, lines + 3 * pitch, dim);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const Ahead next_x(x, row + 1, end), next_residual(residual, row + 1, end);
            const T* s = x.read(row);
            T total;
            if (residual.given()) {
                T* const to = stream_s ? sum.line : sum.place(row);
                total = add_rows(s, residual.read(row), to, stream_s ? sum.place(row) : nullptr,
                                 dim, args.is_rms);
                s = to;
            } else {
                total = add_rows<T>(s, nullptr, nullptr, nullptr, dim, args.is_rms);
            }
            if (sum.given() && !stream_s) sum.write(row, s);
            const T mean = args.is_rms ? T(0) : total / count;
            const T squares = args.is_rms ? total : squared_deviations(s, mean, dim, next_residual);
            const T rstd = T(1) / std::sqrt(squares / count + eps);
            T* const out = y.place(row);
            scale_row(s, mean, rstd, weight, bias, out, dim, stream_y, next_x);
            y.write(row, out);
            if (args.mean.ndim >= 0) *statistic<T>(args.mean, row) = mean;
            if (args.rstd.ndim >= 0) *statistic<T>(args.rstd, row) = rstd;
        }
        if (stream_s || stream_y) end_streams();
    });
}

// Backward --------------------------------------------------------------------------------------

template <class T>
struct RowGrad {
    const T* s;
    const T* dy;
    const T* weight;
    T mean;
    T rstd;
};

/// Adds a row's part to dweight and dbias (null when not wanted) and returns mean(g xhat) and
/// mean(g) with g = dy weight.
template <class T>
void project_row(const RowGrad<T>& row, T* dweight, T* dbias, std::int64_t dim, T* along,
                 T* constant, const Ahead& ahead) {
    Sums<T> gx, g;
    sweep<T>(dim, [&](std::int64_t i, int slot, auto part) __attribute__((always_inline)) {
        ahead.fetch(i);
        const Vec<T> xhat = (take<T>(row.s + i, part) - row.mean) * row.rstd;
        const Vec<T> dy = take<T>(row.dy + i, part);
        const Vec<T> scaled = dy * take<T>(row.weight + i, part);
        if (dweight != nullptr) put<T>(dweight + i, take<T>(dweight + i, part) + dy * xhat, part);
        if (dbias != nullptr) put<T>(dbias + i, take<T>(dbias + i, part) + dy, part);
        gx.part[slot] += inside<T>(scaled * xhat, part);
        g.part[slot] += scaled;
    });
    const T share = T(1) / static_cast<T>(dim);
    *along = gx.total() * share;
    *constant = g.total() * share;
}

/// ds = (g - mean(g) - xhat mean(g xhat)) rstd + dresidual_out (may be null).
template <class T>
void grad_row(const RowGrad<T>& row, T along, T constant, const T* dresidual_out, T* ds,
              std::int64_t dim, bool past_caches, const Ahead& next_s, const Ahead& next_dy) {
    const T slope = -row.rstd * row.rstd * along;
    sweep<T>(dim, [&](std::int64_t i, int, auto part) __attribute__((always_inline)) {
        next_s.fetch(i);
        next_dy.fetch(i);
        Vec<T> v = (take<T>(row.s + i, part) - row.mean) * slope;
        if (dresidual_out != nullptr) v += take<T>(dresidual_out + i, part);
        v += (take<T>(row.dy + i, part) * take<T>(row.weight + i, part) - constant) * row.rstd;
        if constexpr (std::is_same_v<decltype(part), Whole>)
            if (past_caches) return stream<T>(ds + i, v);
        put<T>(ds + i, v, part);
    });
}

template <class T>
void norm_grads(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                int wanted_threads) {
    const RowShape shape(args.x);
    const std::int64_t dim = shape.dim, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    // The cut depends on the sizes only, and so do the sums.
    const std::int64_t most = max(1, min(kPartials, kPartialElements / max(dim, 1)));
    const std::int64_t rows_per_task = max(1, (shape.rows + most - 1) / most);
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const bool has_dweight = grads.dweight.ndim >= 0, has_dbias = grads.dbias.ndim >= 0;
    const Scratch scratch(sizeof(T) *
                          static_cast<std::size_t>(pitch * (1 + 5 * threads + 2 * tasks)));
    T* const memory = static_cast<T*>(scratch.data());
    T* const partials = memory + pitch * (1 + 5 * threads);
    const T* const weight = dense(args.weight, memory, dim);
    const bool stream_dx = grads.dresidual.ndim < 0 && shape.streams<T>(grads.dx);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const lines = memory + pitch * (1 + 5 * thread);
        const Lines<T> x(args.x, lines, dim), residual(args.residual, lines + pitch, dim);
        const Lines<T> dy(grads.dy, lines + 2 * pitch, dim);
        const Lines<T> dsum(grads.dresidual_out, lines + 3 * pitch, dim);
        const Lines<T> dx(grads.dx, lines + 4 * pitch, dim), dresidual(grads.dresidual, lines, dim);
        T* const dweight = has_dweight ? partials + pitch * task : nullptr;
        T* const dbias = has_dbias ? partials + pitch * (tasks + task) : nullptr;
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(dim);
        if (has_dweight) std::memset(dweight, 0, bytes);
        if (has_dbias) std::memset(dbias, 0, bytes);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const T* s = x.read(row);
            if (residual.given()) {
                add_rows<T>(s, residual.read(row), lines, nullptr, dim, false);
                s = lines;
            }
            const RowGrad<T> at{s, dy.read(row), weight,
                                args.is_rms ? T(0) : *statistic<T>(args.mean, row),
                                *statistic<T>(args.rstd, row)};
            T along, constant;
            project_row(at, dweight, dbias, dim, &along, &constant, Ahead(dsum, row, end));
            T* const ds = dx.place(row);
            grad_row(at, along, args.is_rms ? T(0) : constant,
                     dsum.given() ? dsum.read(row) : nullptr, ds, dim, stream_dx,
                     Ahead(x, row + 1, end), Ahead(dy, row + 1, end));
            // dx last: it may be rounded in place of ds.
            if (dresidual.given()) dresidual.write(row, ds);
            dx.write(row, ds);
        }
        if (stream_dx) end_streams();
    });
    reduce_partials(grads.dweight, partials, pitch, tasks, dim, threads);
    reduce_partials(grads.dbias, partials + pitch * tasks, pitch, tasks, dim, threads);
}

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& args, int threads) {
    if (args.x.dtype == DType::f64)
        norm_rows<double>(args, threads);
    else
        norm_rows<float>(args, threads);
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                          int threads) {
    if (args.x.dtype == DType::f64)
        norm_grads<double>(args, grads, threads);
    else
        norm_grads<float>(args, grads, threads);
}

}  // namespace ssm::cpu::SSM_ISA
