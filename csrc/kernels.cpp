// Compiled once per instruction set; exports one table. See README.md here before adding a header.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "codecs.hpp"
#include "rules.hpp"
#include "table.h"

namespace {

using namespace fusedopt;

template <class T>
constexpr T smallest_normal();
template <>
constexpr float smallest_normal<float>() {
  return 1.17549435082228751e-38f;
}
template <>
constexpr double smallest_normal<double>() {
  return 2.22507385850720138e-308;
}

// States below the smallest normal number are stored as zero: a state that decays through the
// denormals would make every later step several times slower.
template <class T>
inline T normal_or_zero(T x) {
  const T magnitude = x < T(0) ? -x : x;
  return magnitude < smallest_normal<T>() ? T(0) : x;
}

// The parts of a tile never overlap: Python's checks see to that, so the compiler may assume it.
template <class Rule, Mode mode, class T, class... S>
inline void apply(const Rule& rule, T factor, T decay, std::size_t n, T* __restrict out,
                  T* __restrict p, const T* __restrict g, S* __restrict... states) {
  constexpr bool peek = mode == PEEK || mode == PEEK_L2;
  for (std::size_t i = 0; i < n; ++i) {
    T w = p[i];
    T gradient = factor * g[i];
    if constexpr (mode == L2 || mode == PEEK_L2) gradient = gradient + decay * w;
    if constexpr (mode == FIRST) w = decay * w;
    const auto update = [&](S... state) {
      const T delta = rule(w, gradient, state...);
      if constexpr (!peek) ((states[i] = normal_or_zero(state)), ...);
      return delta;
    };
    const T delta = update(states[i]...);
    if constexpr (peek)
      out[i] = delta;
    else if constexpr (mode == DECOUPLED)
      p[i] = w - (decay * w + delta);
    else
      p[i] = w - delta;
  }
}

template <class Rule, class T, Mode mode, std::size_t... S>
inline void unpack_rule(void* const* x, const void* scalars, std::size_t n,
                        std::index_sequence<S...>) {
  const T* fields = static_cast<const T*>(scalars);
  Rule rule;
  std::memcpy(&rule, fields + 2, sizeof rule);
  T* out = mode == PEEK || mode == PEEK_L2 ? static_cast<T*>(x[2 + sizeof...(S)]) : nullptr;
  apply<Rule, mode>(rule, fields[0], fields[1], n, out, static_cast<T*>(x[0]),
                    static_cast<const T*>(x[1]), static_cast<T*>(x[2 + S])...);
}

template <class Rule, class T, Mode mode>
void rule_tile(void* const* x, const void* scalars, std::size_t n) {
  unpack_rule<Rule, T, mode>(x, scalars, n, std::make_index_sequence<Rule::states>());
}

template <class Op, class T>
void other_tile(void* const* x, const void* scalars, std::size_t n) {
  static_assert(Op::operands == 2 && Op::written == 1, "the one shape that is needed so far");
  Op op;
  std::memcpy(&op, scalars, sizeof op);
  T* __restrict target = static_cast<T*>(x[0]);
  const T* __restrict source = static_cast<const T*>(x[1]);
  for (std::size_t i = 0; i < n; ++i) {
    T value = target[i];
    op(value, source[i]);
    target[i] = normal_or_zero(value);
  }
}

template <class Rule, class T, int... M>
constexpr Functions modes(std::integer_sequence<int, M...>) {
  return {{rule_tile<Rule, T, static_cast<Mode>(M)>...}};
}

template <template <class> class R>
constexpr Operation rule_entry() {
  using All = std::make_integer_sequence<int, MODES>;
  return {R<float>::name,
          2 + R<float>::states,
          0,
          2 + static_cast<int>(sizeof(R<float>) / sizeof(float)),
          {modes<R<float>, float>(All()), modes<R<double>, double>(All())}};
}

template <template <class> class R>
constexpr Operation other_entry() {
  return {R<float>::name,
          R<float>::operands,
          R<float>::written,
          static_cast<int>(sizeof(R<float>) / sizeof(float)),
          {{{other_tile<R<float>, float>}}, {{other_tile<R<double>, double>}}}};
}

template <class Rules, class Others>
struct Operations;
template <template <class> class... R, template <class> class... O>
struct Operations<List<R...>, List<O...>> {
  static constexpr int count = sizeof...(R) + sizeof...(O);
  static constexpr Operation all[] = {rule_entry<R>()..., other_entry<O>()...};
};

using Everything = Operations<Rules, Others>;

}  // namespace

namespace fusedopt {
extern const Table FUSEDOPT_TABLE;
const Table FUSEDOPT_TABLE = {
    Everything::all,
    Everything::count,
    {{nullptr, decode<float, double>}, {decode<double, float>, nullptr}},
};
}  // namespace fusedopt
