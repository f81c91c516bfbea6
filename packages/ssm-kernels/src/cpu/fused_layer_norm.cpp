// Residual addition with LayerNorm or RMSNorm, forward and backward. A task owns some rows; a row
// stays in the first-level cache between its passes. docs/ops/fused_layer_norm.md#algorithm
#include <ssm/fused_layer_norm.h>

#include <cmath>

#include "../op/scratch.h"
#include "rows.h"

namespace ssm::cpu::SSM_ISA {

namespace {

// Forward ---------------------------------------------------------------------------------------

/// s = x + residual (residual may be null) into `line` and, rounded, into `sum`, where they are
/// given. Returns the sum of s, or of its squares.
template <class T, class E, class R, class S>
T add_rows(const E* x, const R* residual, T* line, S* sum, std::int64_t dim, bool squares,
           bool past_caches) {
    Sums<T, kSums> sums;
    sweep<T, kSums>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        auto s = take<T>(x + i, piece);
        if (residual != nullptr) s = s + take<T>(residual + i, piece);
        if (line != nullptr) put<T>(line + i, s, piece);
        if (sum != nullptr) put_past<T>(sum + i, s, piece, past_caches);
        sums.add(squares ? s * s : s);
    });
    return sums.total();
}

template <class T, class S, class R>
T squared_deviations(const S* s, T mean, std::int64_t dim, const Ahead<R>& next) {
    Sums<T, kSums> sums;
    sweep<T, kSums>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next.template fetch<T>(i, piece);
        const auto d = inside(take<T>(s + i, piece) - mean, piece);
        sums.add(d * d);
    });
    return sums.total();
}

/// y = (s - mean) rstd weight + bias; bias may be null.
template <class T, class S, class E, class R>
void scale_row(const S* s, T mean, T rstd, const T* weight, const T* bias, E* y, std::int64_t dim,
               bool past_caches, const Ahead<E>& next_x, const Ahead<R>& next_residual) {
    sweep<T, kStores>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next_x.template fetch<T>(i, piece);
        next_residual.template fetch<T>(i, piece);
        auto v = (take<T>(s + i, piece) - mean) * rstd * take<T>(weight + i, piece);
        if (bias != nullptr) v = v + take<T>(bias + i, piece);
        put_past<T>(y + i, v, piece, past_caches);
    });
}

/// x and y are arrays of E, the residual of R, s of S.
template <class T, class E, class R, class S>
void norm_rows(const FusedLayerNormArgs& args, int wanted_threads) {
    const RowShape shape(args.x);
    const std::int64_t dim = shape.dim, pitch = shape.pitch;
    const int threads = shape.threads(wanted_threads);
    const Scratch scratch(sizeof(T) * static_cast<std::size_t>(pitch * (2 + 5 * threads)));
    T* const memory = static_cast<T*>(scratch.data());
    const T* const weight = dense(args.weight, memory, dim);
    const T* const bias = dense(args.bias, memory + pitch, dim);
    const bool stream_s = args.residual.ndim >= 0 && shape.streams<T, S>(args.residual_out);
    const bool stream_y = shape.streams<T, E>(args.y);
    const std::int64_t rows_per_task = max(1, kTaskElements / max(dim, 1));
    const std::int64_t tasks = (shape.rows + rows_per_task - 1) / rows_per_task;
    const T count = static_cast<T>(max(dim, 1)), eps = static_cast<T>(args.eps);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const line = memory + pitch * (2 + 5 * thread);
        const auto lines = [&](int k) { return static_cast<void*>(line + k * pitch); };
        const RowLines<E> x(args.x, lines(1), dim), y(args.y, lines(2), dim);
        const RowLines<R> residual(args.residual, lines(3), dim);
        const RowLines<S> sum(args.residual_out, lines(4), dim);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            const Ahead next_x(x, row + 1, end);
            const Ahead next_residual(residual, row + 1, end), nothing(residual, end, end);
            const E* const from = x.read(row);
            E* const out = y.place(row);
            T mean = 0, rstd = 0;
            const auto normalise = [&](const auto* s, T total) {
                mean = args.is_rms ? T(0) : total / count;
                const T squares =
                    args.is_rms ? total : squared_deviations<T>(s, mean, dim, next_residual);
                rstd = T(1) / std::sqrt(squares / count + eps);
                scale_row(s, mean, rstd, weight, bias, out, dim, stream_y, next_x,
                          args.is_rms ? next_residual : nothing);
            };
            if (residual.given() || sum.given()) {
                // s is read again: unrounded, and not from where it was streamed to.
                S* const to = sum.given() ? sum.place(row) : nullptr;
                const R* const other = residual.given() ? residual.read(row) : nullptr;
                T* s = line;
                if constexpr (std::is_same_v<S, T>)
                    if (to != nullptr && !stream_s) s = to;
                S* const rounded = static_cast<void*>(to) == s ? nullptr : to;
                normalise(s, add_rows<T>(from, other, s, rounded, dim, args.is_rms, stream_s));
                if (to != nullptr) sum.write(row, to);
            } else {
                normalise(from, add_rows<T, E, R, S>(from, nullptr, nullptr, nullptr, dim,
                                                     args.is_rms, false));
            }
            y.write(row, out);
            if (args.mean.ndim >= 0) *statistic<T>(args.mean, row) = mean;
            if (args.rstd.ndim >= 0) *statistic<T>(args.rstd, row) = rstd;
        }
        if (stream_s || stream_y) end_streams();
    });
}

// Backward --------------------------------------------------------------------------------------

/// s is an array of S, dy of E.
template <class T, class S, class E>
struct RowGrad {
    const S* s;
    const E* dy;
    const T* weight;
    T mean;
    T rstd;
};

/// Adds a row's part to dweight and dbias (null when not wanted) and returns mean(g xhat) and
/// mean(g) with g = dy weight.
template <class T, class S, class E, class R>
void project_row(const RowGrad<T, S, E>& given, T* dweight, T* dbias, std::int64_t dim, T* along,
                 T* constant, const Ahead<R>& ahead) {
    // A copy that nothing can point to: stores do not make it be read again.
    const RowGrad<T, S, E> row = given;
    Sums<T, kStores> gx, g;
    sweep<T, kStores>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        ahead.template fetch<T>(i, piece);
        const auto xhat = (take<T>(row.s + i, piece) - row.mean) * row.rstd;
        const auto dy = take<T>(row.dy + i, piece);
        const auto scaled = dy * take<T>(row.weight + i, piece);
        if (dweight != nullptr) put<T>(dweight + i, take<T>(dweight + i, piece) + dy * xhat, piece);
        if (dbias != nullptr) put<T>(dbias + i, take<T>(dbias + i, piece) + dy, piece);
        gx.add(inside(scaled * xhat, piece));
        g.add(scaled);
    });
    const T share = T(1) / static_cast<T>(dim);
    *along = gx.total() * share;
    *constant = g.total() * share;
}

/// ds = (g - mean(g) - xhat mean(g xhat)) rstd + dresidual_out (may be null), into dx and, where it
/// is given, dresidual.
template <class T, class S, class E, class R>
void grad_row(const RowGrad<T, S, E>& given, T along, T constant, const R* dresidual_out, E* dx,
              R* dresidual, std::int64_t dim, bool past_caches, const Ahead<R>& next_s,
              const Ahead<E>& next_dy) {
    const RowGrad<T, S, E> row = given;
    const T slope = -row.rstd * row.rstd * along;
    sweep<T, kStores>(dim, [&](std::int64_t i, auto piece) __attribute__((always_inline)) {
        next_s.template fetch<T>(i, piece);
        next_dy.template fetch<T>(i, piece);
        auto v = (take<T>(row.s + i, piece) - row.mean) * slope;
        if (dresidual_out != nullptr) v = v + take<T>(dresidual_out + i, piece);
        v = v + (take<T>(row.dy + i, piece) * take<T>(row.weight + i, piece) - constant) * row.rstd;
        put_past<T>(dx + i, v, piece, past_caches);
        if (dresidual != nullptr) put<T>(dresidual + i, v, piece);
    });
}

/// dy and dx are arrays of E; x or s, the residual and their gradients are arrays of S.
template <class T, class E, class S>
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
                          static_cast<std::size_t>(pitch * (1 + 7 * threads + 2 * tasks)));
    T* const memory = static_cast<T*>(scratch.data());
    T* const partials = memory + pitch * (1 + 7 * threads);
    const T* const weight = dense(args.weight, memory, dim);
    const bool stream_dx = shape.streams<T, E>(grads.dx);

    parallel_for(tasks, threads, [&](std::int64_t task, int thread) {
        T* const line = memory + pitch * (1 + 7 * thread);
        const auto lines = [&](int k) { return static_cast<void*>(line + k * pitch); };
        const RowLines<S> x(args.x, lines(1), dim), residual(args.residual, lines(2), dim);
        const RowLines<S> dsum(grads.dresidual_out, lines(3), dim);
        const RowLines<S> dresidual(grads.dresidual, lines(4), dim);
        const RowLines<E> dy(grads.dy, lines(5), dim), dx(grads.dx, lines(6), dim);
        T* const dweight = has_dweight ? partials + pitch * task : nullptr;
        T* const dbias = has_dbias ? partials + pitch * (tasks + task) : nullptr;
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(dim);
        if (has_dweight) std::memset(dweight, 0, bytes);
        if (has_dbias) std::memset(dbias, 0, bytes);
        const std::int64_t end = min(shape.rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
            E* const to_x = dx.place(row);
            S* const to_residual = dresidual.given() ? dresidual.place(row) : nullptr;
            const E* const from = dy.read(row);
            const auto differentiate = [&](const auto* s) {
                using Sum = std::decay_t<decltype(*s)>;
                const RowGrad<T, Sum, E> at{s, from, weight,
                                            args.is_rms ? T(0) : *statistic<T>(args.mean, row),
                                            *statistic<T>(args.rstd, row)};
                T along, constant;
                project_row(at, dweight, dbias, dim, &along, &constant, Ahead(dsum, row, end));
                grad_row(at, along, args.is_rms ? T(0) : constant,
                         dsum.given() ? dsum.read(row) : nullptr, to_x, to_residual, dim, stream_dx,
                         Ahead(x, row + 1, end), Ahead(dy, row + 1, end));
            };
            if (residual.given()) {
                add_rows<T>(x.read(row), residual.read(row), line, static_cast<S*>(nullptr), dim,
                            false, false);
                differentiate(const_cast<const T*>(line));
            } else {
                differentiate(x.read(row));
            }
            dx.write(row, to_x);
            if (dresidual.given()) dresidual.write(row, to_residual);
        }
        if (stream_dx) end_streams();
    });
    reduce_partials(grads.dweight, partials, pitch, tasks, dim, threads);
    reduce_partials(grads.dbias, partials + pitch * tasks, pitch, tasks, dim, threads);
}

/// Whether all tensors that are given have this type.
bool all_are(DType dtype, std::initializer_list<const TensorView*> tensors) {
    for (const TensorView* tensor : tensors)
        if (tensor->ndim >= 0 && tensor->dtype != dtype) return false;
    return true;
}

// Activations of a half type, with the sum in the same type or in float32.
template <class E>
bool norm_rows_as(const FusedLayerNormArgs& args, int threads) {
    if (!all_are(kElement<E>, {&args.x, &args.y})) return false;
    const bool half = all_are(kElement<E>, {&args.residual});
    if (half && all_are(kElement<E>, {&args.residual_out}))
        norm_rows<float, E, E, E>(args, threads);
    else if (half && all_are(DType::f32, {&args.residual_out}))
        norm_rows<float, E, E, float>(args, threads);
    else if (all_are(DType::f32, {&args.residual, &args.residual_out}))
        norm_rows<float, E, float, float>(args, threads);
    else
        return false;
    return true;
}

template <class E>
bool norm_grads_as(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads, int threads) {
    if (!all_are(kElement<E>, {&grads.dy, &grads.dx})) return false;
    const auto sums = {&args.x, &args.residual, &grads.dresidual_out, &grads.dresidual};
    if (all_are(kElement<E>, sums))
        norm_grads<float, E, E>(args, grads, threads);
    else if (all_are(DType::f32, sums))
        norm_grads<float, E, float>(args, grads, threads);
    else
        return false;
    return true;
}

}  // namespace

void fused_layer_norm_fwd(const FusedLayerNormArgs& args, int threads) {
    if (args.x.dtype == DType::f64) return norm_rows<double, double, double, double>(args, threads);
    if (norm_rows_as<BFloat16>(args, threads) || norm_rows_as<Float16>(args, threads)) return;
    norm_rows<float, float, float, float>(args, threads);
}

void fused_layer_norm_bwd(const FusedLayerNormArgs& args, const FusedLayerNormGrads& grads,
                          int threads) {
    if (args.x.dtype == DType::f64) return norm_grads<double, double, double>(args, grads, threads);
    if (norm_grads_as<BFloat16>(args, grads, threads) ||
        norm_grads_as<Float16>(args, grads, threads))
        return;
    norm_grads<float, float, float>(args, grads, threads);
}

}  // namespace ssm::cpu::SSM_ISA
