// Sequences inside the rows of a batch, as the kernels walk them.
#pragma once

#include <ssm/tensor.h>

#include <memory>

namespace ssm {

/// A maximal stretch of steps of one row that belong to one sequence and are not skipped.
struct Run {
    static constexpr std::int64_t kContinue = -1;  // the state goes on from the run before
    static constexpr std::int64_t kZero = -2;      // a new sequence that starts from zero
    static constexpr std::int64_t kNone = -1;      // the state after this run is not an output

    std::int64_t begin;
    std::int64_t end;
    std::int64_t state_in;   // index of the initial state, kContinue or kZero
    std::int64_t state_out;  // index of the last state, or kNone
};

/// The runs of row b are runs[row_begin[b]] .. runs[row_begin[b + 1] - 1], in order of time.
/// Plain data: kernels of every instruction set read it.
struct Runs {
    const Run* runs = nullptr;
    const std::int64_t* row_begin = nullptr;
    bool covers_all = true;  // every step of every row is in a run
};

/// Where the sequence of a step began, as the stages of the chunked scan say it for each (B, L): a
/// place in the chunk, or one of these.
struct Origin {
    static constexpr std::int64_t kSkipped = -2;
    static constexpr std::int64_t kEntered = -1;  // before the chunk, or before the row
};

/// Owns what a Runs refers to.
class RunTable {
  public:
    static constexpr std::int64_t kAnyNumber = -1;  // no state is given that a number could miss

    /// Without `seq_idx` each row is one run. Throws std::invalid_argument when a sequence number
    /// is below -1, is not below `num_states` (only with `state_per_sequence`), or comes back after
    /// another sequence or in another row.
    RunTable(const char* op, const TensorView& seq_idx, std::int64_t batch, std::int64_t seqlen,
             bool state_per_sequence, std::int64_t num_states);
    ~RunTable();
    RunTable(const RunTable&) = delete;
    RunTable& operator=(const RunTable&) = delete;

    const Runs& view() const { return view_; }

  private:
    struct Storage;
    std::unique_ptr<Storage> storage_;
    Runs view_;
};

}  // namespace ssm
