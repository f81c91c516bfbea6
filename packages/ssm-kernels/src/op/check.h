// The error grammar `<op>: <argument> must <rule>, got <value>` and the checks that speak it.
#pragma once

#include <ssm/tensor.h>

#include <initializer_list>
#include <string>
#include <string_view>

namespace ssm {

inline bool present(const TensorView& view) { return view.ndim != kAbsent; }

[[noreturn]] void fail(std::string_view op, std::string_view argument, std::string_view rule,
                       std::string_view got);

const char* dtype_name(DType dtype);
std::string device_text(const Device& device);
std::string shape_text(const TensorView& view);
bool is_float(DType dtype);
bool has_shape_of(const TensorView& view, const TensorView& other);
/// 1 for a dtype that no operator takes.
std::int64_t element_bytes(DType dtype);

/// One named axis: its letter in the documentation and the size it must have.
struct Axis {
    const char* letter;
    std::int64_t size;
};

/// Checks of one call's arguments, made in argument order: presence, rank, shape, dtype, device,
/// and that no output begins where another argument does: one object serves the whole call.
class Checker {
  public:
    Checker(std::string_view op, const Device& device) : op_(op), device_(device) {}

    void rank(std::string_view name, const TensorView& view, int ndim,
              std::string_view letters) const;
    void shape(std::string_view name, const TensorView& view,
               std::initializer_list<Axis> axes) const;
    /// Shape, floating dtype and device of an input.
    void input(std::string_view name, const TensorView& view, std::initializer_list<Axis> axes);
    void optional_input(std::string_view name, const TensorView& view,
                        std::initializer_list<Axis> axes);
    /// As input; besides, no two elements may share memory, nor this and another argument.
    void output(std::string_view name, const TensorView& view, std::initializer_list<Axis> axes);
    void optional_output(std::string_view name, const TensorView& view,
                         std::initializer_list<Axis> axes);
    /// An output that may be the input `from`, element by element, such as a state.
    void optional_carried(std::string_view name, const TensorView& view,
                          std::initializer_list<Axis> axes, std::string_view from_name,
                          const TensorView& from);
    void dtype(std::string_view name, const TensorView& view, DType wanted) const;
    void floating(std::string_view name, const TensorView& view) const;
    void device(std::string_view name, const TensorView& view);
    /// Shape, dtype int32 and device of an input that holds indices.
    void indices(std::string_view name, const TensorView& view, std::initializer_list<Axis> axes);
    /// state_indices (B): rows of a state of `rows` rows, or -1. Two batch rows with one state
    /// would race; an index beyond the state would read wild memory. Values on a GPU are not looked
    /// at: there the kernel skips what lies outside.
    void state_indices(const TensorView& view, std::int64_t batch, std::int64_t rows);
    /// Refuses a view of which two elements share memory, or might: every stride must pass the
    /// extent of the axes inside it.
    void no_overlap(std::string_view name, const TensorView& view) const;
    /// no_overlap, for a view that has been checked as an input and will be written. Refuses
    /// another argument, before or after this one, that begins at the same place; whether they
    /// share memory elsewhere is the caller's to know.
    void written(std::string_view name, const TensorView& view);
    /// written, but for an input of the same layout.
    void carried(std::string_view name, const TensorView& view, std::string_view from_name,
                 const TensorView& from);
    void contiguous(std::string_view name, const TensorView& view) const;
    void same_shape(std::string_view name, const TensorView& view, const TensorView& like) const;
    void given(std::string_view name, const TensorView& view) const;
    [[noreturn]] void fail(std::string_view argument, std::string_view rule,
                           std::string_view got) const {
        ssm::fail(op_, argument, rule, got);
    }

  private:
    struct Place {
        std::string_view name;
        const void* data;
        bool written;
    };
    /// Notes where a view begins; refuses a place that is written already.
    void note(std::string_view name, const TensorView& view);
    /// Marks a noted place as written; only `from_name` may begin there too.
    void claim(std::string_view name, const TensorView& view, std::string_view from_name);
    [[noreturn]] void refuse_shared(std::string_view name, std::string_view other) const;

    std::string_view op_;
    Device device_;
    static constexpr int kMostPlaces = 32;  // more than any operator has arguments
    Place places_[kMostPlaces];
    int place_count_ = 0;
};

}  // namespace ssm
