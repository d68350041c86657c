#include "trie/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <condition_variable>

#include "trie/keys.h"
#include "trie/substrings.h"

namespace py = pybind11;

namespace fastmix::trie {
namespace {

using Numbers = py::array_t<int64_t, py::array::c_style>;
using Bytes = std::pair<uint8_t*, uint64_t>;

constexpr uint64_t kSequencesPerThread = 1 << 14;  // fewer are not worth another thread

// work() in a thread of its own and without the GIL. This thread looks for Ctrl-C and calls progress(share) meanwhile;
// an exception of either stops the work and is thrown when it has ended.
template <class Work>
Bytes watched(Monitor& monitor, const py::object& progress, Work&& work) {
  Bytes result{};
  std::exception_ptr error, unwanted;
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  const py::gil_scoped_release release;
  std::thread worker([&] {
    try {
      result = work();
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    done = true;
    ended.notify_one();
  });
  std::unique_lock<std::mutex> lock(mutex);
  while (!ended.wait_for(lock, std::chrono::milliseconds(50), [&] { return done; })) {
    if (unwanted) continue;
    lock.unlock();
    {
      const py::gil_scoped_acquire acquire;
      try {
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!progress.is_none()) progress(monitor.done.load());
      } catch (...) {
        unwanted = std::current_exception();
        monitor.stop = true;
      }
    }
    lock.lock();
  }
  lock.unlock();
  worker.join();
  if (unwanted) {
    std::free(result.first);
    std::rethrow_exception(unwanted);
  }
  if (error) std::rethrow_exception(error);
  return result;
}

// f(pointer) for the C++ type of an int array.
template <class F>
auto for_dtype(const py::array& tokens, F&& f) {
  if (py::isinstance<py::array_t<int64_t>>(tokens)) return f(static_cast<const int64_t*>(tokens.data()));
  if (py::isinstance<py::array_t<int32_t>>(tokens)) return f(static_cast<const int32_t*>(tokens.data()));
  if (py::isinstance<py::array_t<uint16_t>>(tokens)) return f(static_cast<const uint16_t*>(tokens.data()));
  if (py::isinstance<py::array_t<uint32_t>>(tokens)) return f(static_cast<const uint32_t*>(tokens.data()));
  throw py::type_error("tokens must be int32, int64, uint16 or uint32");
}

template <class Token>
Sequences<Token> sequences_of(const py::array& tokens, const Token* data, const std::optional<Numbers>& offsets,
                              std::optional<int64_t> pad, const char* name) {
  const auto size = static_cast<py::ssize_t>(sizeof(Token));
  if (offsets) {
    const int64_t* bounds = offsets->data();
    const auto count = offsets->size() - 1;
    if (tokens.ndim() != 1 || (tokens.size() > 1 && tokens.strides(0) != size) || offsets->ndim() != 1 || count < 0 ||
        bounds[0] < 0 || bounds[count] > tokens.size() || !std::is_sorted(bounds, bounds + count + 1)) {
      throw py::value_error("offsets must be N + 1 places of contiguous tokens that do not decrease");
    }
    return {data, static_cast<uint64_t>(count), bounds, 0, 0, std::nullopt, name};
  }
  if (tokens.ndim() != 2 || (tokens.size() > 0 && ((tokens.shape(1) > 1 && tokens.strides(1) != size) ||
                                                   tokens.strides(0) % size != 0 || tokens.strides(0) < 0))) {
    throw py::value_error("tokens must be a matrix of contiguous rows");
  }
  return {data,
          static_cast<uint64_t>(tokens.shape(0)),
          nullptr,
          static_cast<uint64_t>(tokens.shape(1)),
          static_cast<uint64_t>(tokens.strides(0) / size),
          pad,
          name};
}

// The array owns the block.
py::array_t<uint8_t> as_array(Bytes bytes) {
  const py::capsule owner(bytes.first, [](void* block) { std::free(block); });
  return py::array_t<uint8_t>(bytes.second, bytes.first, owner);
}

int useful_threads(uint64_t sequences, int threads) {
  return static_cast<int>(std::clamp<uint64_t>(sequences / kSequencesPerThread, 1, std::max(threads, 1)));
}

template <class Token, class Build>
Bytes with_vocabulary(const Sequences<Token>& sequences, std::optional<uint64_t> vocab_size, int threads,
                      Monitor& monitor, Build&& build) {
  Vocabulary vocabulary(vocab_size.value_or(0));
  Measure all =
      measure(sequences, vocab_size.value_or(kMaxVocab), vocab_size ? &vocabulary : nullptr, threads, monitor);
  if (sequences.count == 0) all.shortest = 0;
  if (!vocab_size) {
    vocabulary = Vocabulary(all.symbols == 0 ? 0 : all.max_token + 1);
    mark_tokens(sequences, vocabulary, threads, monitor);
  }
  vocabulary.finish();
  return vocabulary.symbol_bytes() == 2 ? build(vocabulary, all, uint16_t{}) : build(vocabulary, all, uint32_t{});
}

py::array_t<uint8_t> build_keys(const py::array& tokens, const std::optional<Numbers>& offsets,
                                std::optional<int64_t> pad_id, const std::optional<Numbers>& payloads,
                                const std::optional<Numbers>& payload_offsets, std::optional<uint64_t> vocab_size,
                                int threads, const py::object& progress) {
  Payloads values{payloads ? payloads->data() : nullptr, payload_offsets ? payload_offsets->data() : nullptr,
                  payloads ? static_cast<uint64_t>(payloads->size()) : 0};
  return for_dtype(tokens, [&](const auto* data) {
    const auto sequences = sequences_of(tokens, data, offsets, pad_id, "sequence");
    const int used_threads = useful_threads(sequences.count, threads);
    const uint64_t bounds = payload_offsets ? payload_offsets->size() : 0;
    const bool fits = payload_offsets ? payloads && bounds == sequences.count + 1 && values.offsets[0] == 0 &&
                                            std::is_sorted(values.offsets, values.offsets + bounds) &&
                                            static_cast<uint64_t>(values.offsets[bounds - 1]) == values.count
                                      : !payloads || values.count == sequences.count;
    if (!fits) throw py::value_error("payloads must fit the sequences");
    Monitor monitor;
    return as_array(watched(monitor, progress, [&] {
      return with_vocabulary(sequences, vocab_size, used_threads, monitor,
                             [&](const Vocabulary& vocabulary, const Measure& all, auto symbol) {
                               using Token = std::decay_t<decltype(*data)>;
                               KeyBuilder<Token, decltype(symbol)> builder(sequences, vocabulary, all, used_threads,
                                                                           monitor);
                               return builder.build(values);
                             });
    }));
  });
}

py::array_t<uint8_t> build_substrings(const py::array& tokens, const std::optional<Numbers>& offsets,
                                      std::optional<uint64_t> vocab_size, int threads, const py::object& progress) {
  return for_dtype(tokens, [&](const auto* data) {
    const auto passages = sequences_of(tokens, data, offsets, std::nullopt, "passage");
    Monitor monitor;
    return as_array(watched(monitor, progress, [&] {
      return with_vocabulary(passages, vocab_size, useful_threads(passages.count, threads), monitor,
                             [&](const Vocabulary& vocabulary, const Measure& all, auto symbol) {
                               using Token = std::decay_t<decltype(*data)>;
                               SubstringBuilder<Token, decltype(symbol)> builder(passages, vocabulary, all, monitor);
                               return builder.build();
                             });
    }));
  });
}

}  // namespace

void bind(py::module_& module) {
  using namespace py::literals;
  module.def("build_keys", &build_keys, "The bytes of a trie of sequences, without checksums", "tokens"_a, "offsets"_a,
             "pad_id"_a, "payloads"_a, "payload_offsets"_a, "vocab_size"_a, "threads"_a, "progress"_a);
  module.def("build_substrings", &build_substrings, "The bytes of a trie of all substrings of passages", "tokens"_a,
             "offsets"_a, "vocab_size"_a, "threads"_a, "progress"_a);
}

}  // namespace fastmix::trie
