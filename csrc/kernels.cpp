// Compiled once per instruction set; exports one table. See README.md here before adding a header.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "codecs.hpp"
#include "direct.hpp"
#include "newton_schulz.hpp"
#include "rules.hpp"
#include "table.h"

namespace {

using namespace fusedopt;

// A rule or another operation from its scalars.
template <class Op>
Op from_scalars(const void* scalars) {
  static_assert(__is_trivially_copyable(Op), "its fields are copied");
  Op op;
  if constexpr (!__is_empty(Op)) {
    std::memcpy(&op, scalars, sizeof op);
#if defined(__GNUC__)
    // GCC would keep four fields in registers, take them out of there in every round of a
    // loop, and not vectorise that: Rprop took eight times as long.
    if constexpr (sizeof op == 4 * alignof(Op)) asm("" : "+m"(op));
#endif
  }
  return op;
}

template <class Rule>
constexpr auto written(int) -> decltype(Rule::written) {
  return Rule::written;
}
template <class Rule>
constexpr int written(long) {
  return Rule::states;
}

// The operands of a tile never overlap: the checks of plans and updates see to that, so the
// compiler need not. (GCC loses `__restrict` on a pack of pointers, and would test them all at run
// time, for each tensor.)
#if defined(__clang__)
#define OPERANDS_DO_NOT_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define OPERANDS_DO_NOT_OVERLAP _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define OPERANDS_DO_NOT_OVERLAP __pragma(loop(ivdep))
#else
#define OPERANDS_DO_NOT_OVERLAP
#endif

// One element's update: what the parameter becomes, or in a PEEK mode the delta. scaled: the factor
// on the gradient is not 1, which it is in most steps.
template <class Rule, Mode mode, bool scaled, class T, class... S>
inline T updated(const Rule& rule, T factor, T decay, T w, T g, S&... states) {
  T gradient = scaled ? factor * g : g;
  if constexpr (mode == L2 || mode == PEEK_L2) gradient = gradient + decay * w;
  if constexpr (mode == FIRST) w = decay * w;
  const T delta = rule(w, gradient, states...);
  if constexpr (mode == PEEK || mode == PEEK_L2)
    return delta;
  else if constexpr (mode == DECOUPLED)
    return w - (decay * w + delta);
  else if constexpr (mode == CAUTIOUS)
    return w - (opposed(delta, w) ? delta : decay * w + delta);
  else
    return w - delta;
}

template <class Rule, Mode mode, bool scaled, std::size_t... K, class T, class... S>
inline void apply(std::index_sequence<K...>, const Rule& rule, T factor, T decay, std::size_t n,
                  T* out, T* p, const T* g, S*... states) {
  constexpr bool peek = mode == PEEK || mode == PEEK_L2;
  OPERANDS_DO_NOT_OVERLAP
  for (std::size_t i = 0; i < n; ++i) {
    const auto update = [&](S... state) {
      const T result = updated<Rule, mode, scaled>(rule, factor, decay, p[i], g[i], state...);
      if constexpr (!peek)
        ((static_cast<int>(K) < written<Rule>(0) ? void(states[i] = normal_or_zero(state))
                                                 : void()),
         ...);
      return result;
    };
    (peek ? out : p)[i] = update(states[i]...);
  }
}

template <class Rule, class T, Mode mode, std::size_t... S>
inline void unpack_rule(void* const* x, const void* scalars, std::size_t n,
                        std::index_sequence<S...>) {
  const T* fields = static_cast<const T*>(scalars);
  const Rule rule = from_scalars<Rule>(fields + 2);
  constexpr bool peek = mode == PEEK || mode == PEEK_L2;
  T* const out = peek ? static_cast<T*>(x[2 + sizeof...(S)]) : nullptr;
  const auto run = [&](auto scaled) {
    apply<Rule, mode, decltype(scaled)::value>(
        std::index_sequence<S...>(), rule, fields[0], fields[1], n, out, static_cast<T*>(x[0]),
        static_cast<const T*>(x[1]), static_cast<T*>(x[2 + S])...);
  };
  // One multiplication less is 6 % of AdamW in cache; doubles and peeks are not worth the code.
  if (sizeof(T) == sizeof(float) && !peek && fields[0] == T(1))
    run(std::integral_constant<bool, peek || sizeof(T) != sizeof(float)>());
  else
    run(std::integral_constant<bool, true>());
}

template <class Rule, class T, Mode mode>
void rule_tile(void* const* x, const void* scalars, std::size_t n) {
  unpack_rule<Rule, T, mode>(x, scalars, n, std::make_index_sequence<Rule::states>());
}

// n: a multiple of CHUNK.
template <class Rule, Mode mode, bool scaled, class F, std::size_t... K>
inline void apply_direct(std::index_sequence<K...>, const Place* x, const void* scalars,
                         std::size_t n) {
  static_assert(written<Rule>(0) == Rule::states, "all states are stored");
  using P = Chunks<typename F::Parameter>;
  using C = Chunks<typename F::Copy>;
  const float* const fields = static_cast<const float*>(scalars);
  const Rule rule = from_scalars<Rule>(fields + 2);
  const float factor = fields[0], decay = fields[1];
  const Place parameter = x[0], gradient = x[1], copy = x[2 + sizeof...(K)];
  const Place own[sizeof...(K) + 1] = {x[2 + K]...};
  (void)own;
  for (std::size_t at = 0; at < n; at += AT_ONCE) {
    alignas(64) float p[AT_ONCE], g[AT_ONCE], states[sizeof...(K) + 1][AT_ONCE];
    P::load(parameter, at, p);
    Chunks<typename F::Gradient>::load(gradient, at, g);
    (StateChunks<F, K>::load(own[K], at, states[K]), ...);
    for (std::size_t i = 0; i < AT_ONCE; ++i)
      p[i] = updated<Rule, mode, scaled>(rule, factor, decay, p[i], g[i], states[K][i]...);
    // One branch for all of them: one for each takes a tenth longer.
    unsigned odd = P::template odd<false>(p) | C::template odd<false>(p);
    ((odd |= StateChunks<F, K>::template odd<true>(states[K])), ...);
    P::template store<false>(p, odd, parameter, at);
    (StateChunks<F, K>::template store<true>(states[K], odd, own[K], at), ...);
    C::template store<false>(p, odd, copy, at);
  }
}

template <class Rule, Mode mode, class F>
void direct_loop(const Place* x, const void* scalars, std::size_t n) {
  if (*static_cast<const float*>(scalars) == 1.0f)
    apply_direct<Rule, mode, false, F>(std::make_index_sequence<Rule::states>(), x, scalars, n);
  else
    apply_direct<Rule, mode, true, F>(std::make_index_sequence<Rule::states>(), x, scalars, n);
}

// A struct without fields has a size all the same.
template <template <class> class R>
constexpr int fields() {
  return __is_empty(R<float>) ? 0 : static_cast<int>(sizeof(R<float>) / sizeof(float));
}

template <class Op, class T>
void other_tile(void* const* x, const void* scalars, std::size_t n) {
  const Op op = from_scalars<Op>(scalars);
  T* target = static_cast<T*>(x[0]);
  const T* source = static_cast<const T*>(x[1]);
  OPERANDS_DO_NOT_OVERLAP
  for (std::size_t i = 0; i < n; ++i) {
    T value = target[i];
    op(value, source[i]);
    target[i] = Op::state ? normal_or_zero(value) : value;
  }
}

// Bytes ahead that are prefetched: sums read memory faster than the processor's own prefetching
// reaches, over GPT-2 small by a tenth.
constexpr std::size_t AHEAD = 2048;

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(static_cast<const char*>(p) + AHEAD);
#else
  (void)p;
#endif
}

// Fewer elements than there are lanes, and zeros.
template <class T>
struct Rest {
  alignas(64) T values[LANES] = {};
  Rest(const T* x, std::size_t n) {
    for (std::size_t k = 0; k < n; ++k) values[k] = x[k];
  }
};
#if defined(FUSEDOPT_AVX512)
template <>
struct Rest<float> {
  alignas(64) float values[LANES];
  Rest(const float* x, std::size_t n) {
    const auto some = static_cast<__mmask16>((1u << n) - 1);
    _mm512_store_ps(values, _mm512_maskz_loadu_ps(some, x));
  }
};
#endif

// All lanes at once, where nothing is added to some: small leaves have no time for one at a time.
template <class Op, class... T>
inline void add_rest(const Op& op, double (&sums)[LANES], std::size_t n, const Rest<T>&... x) {
  alignas(64) double addends[LANES];
  for (std::size_t lane = 0; lane < LANES; ++lane) addends[lane] = op(x.values[lane]...);
  for (std::size_t lane = 0; lane < LANES; ++lane) addends[lane] = lane < n ? addends[lane] : 0.0;
#if defined(__GNUC__)
  // Otherwise GCC takes each lane for a variable of its own, here and in the loop before.
  asm("" : "+m"(addends));
#endif
  for (std::size_t lane = 0; lane < LANES; ++lane) sums[lane] += addends[lane];
}

template <class Op, class... T>
inline void add_up(const Op& op, double (&sums)[LANES], std::size_t n, const T*... x) {
  std::size_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    (prefetch(x + i), ...);
    for (std::size_t lane = 0; lane < LANES; ++lane) sums[lane] += op(x[i + lane]...);
  }
  if (i < n) add_rest(op, sums, n - i, Rest<T>(x + i, n - i)...);
}

template <class Op, class T>
inline void add_operands(void* const* x, const void* scalars, std::size_t n,
                         double (&sums)[LANES]) {
  const Op op = from_scalars<Op>(scalars);
  const T* const a = static_cast<const T*>(x[1]);
  if constexpr (Op::operands == 1)
    add_up(op, sums, n, a);
  else
    add_up(op, sums, n, a, static_cast<const T*>(x[2]));
}

template <class Op, class T>
void sum_tile(void* const* x, const void* scalars, std::size_t n) {
  double sums[LANES];
  std::memcpy(sums, x[0], sizeof sums);
  add_operands<Op, T>(x, scalars, n, sums);
  std::memcpy(x[0], sums, sizeof sums);
}

template <std::size_t count>
inline double pairwise(const double (&lanes)[count]) {
  if constexpr (count == 1) {
    return lanes[0];
  } else {
    double half[count / 2];
    for (std::size_t k = 0; k < count / 2; ++k) half[k] = lanes[k] + lanes[k + count / 2];
    return pairwise(half);
  }
}

template <class Op, class T>
void sum_segment(void* const* x, const void* scalars, std::size_t n) {
  double sums[LANES] = {};
  add_operands<Op, T>(x, scalars, n, sums);
  *static_cast<double*>(x[0]) = pairwise(sums);
}

// The same struct in float64, with the scalars that the rule begins with; those that the sums will
// give are zero.
template <class Wide, class T>
Wide widened(const T* fields) {
  constexpr std::size_t all = sizeof(Wide) / sizeof(double), given = all - Wide::measured;
  double values[all] = {};
  for (std::size_t k = 0; k < given; ++k) values[k] = static_cast<double>(fields[k]);
  Wide rule;
  std::memcpy(&rule, values, sizeof rule);
  return rule;
}

// The measurement that a rule makes of its operands before it runs. The gradient is the one that
// the rule will see, in the compute type; everything after that is float64.
template <class Wide, Mode mode, class T, class... S>
inline void add_measures(const Wide& rule, T factor, T decay, void* const* x, std::size_t n,
                         const T* p, const T* g, const S*... states) {
  double sums[Wide::sums][LANES];
  for (int k = 0; k < Wide::sums; ++k) std::memcpy(sums[k], x[k], sizeof sums[k]);
  const auto add = [&](std::size_t i, std::size_t lane) {
    T w = p[i];
    T gradient = factor * g[i];
    if constexpr (mode == L2) gradient = gradient + decay * w;
    if constexpr (mode == FIRST) w = decay * w;
    double addends[Wide::sums];
    rule.measure(addends, static_cast<double>(w), static_cast<double>(gradient),
                 static_cast<double>(states[i])...);
    for (int k = 0; k < Wide::sums; ++k) sums[k][lane] += addends[k];
  };
  std::size_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (std::size_t lane = 0; lane < LANES; ++lane) add(i + lane, lane);
  for (std::size_t lane = 0; i + lane < n; ++lane) add(i + lane, lane);
  for (int k = 0; k < Wide::sums; ++k) std::memcpy(x[k], sums[k], sizeof sums[k]);
}

template <class Wide, class T, Mode mode, std::size_t... S>
inline void unpack_measures(void* const* x, const void* scalars, std::size_t n,
                            std::index_sequence<S...>) {
  const T* const fields = static_cast<const T*>(scalars);
  void* const* const own = x + Wide::sums;
  add_measures<Wide, mode>(widened<Wide>(fields + 2), fields[0], fields[1], x, n,
                           static_cast<const T*>(own[0]), static_cast<const T*>(own[1]),
                           static_cast<const T*>(own[2 + S])...);
}

template <class Wide, class T, Mode mode>
void measure_tile(void* const* x, const void* scalars, std::size_t n) {
  unpack_measures<Wide, T, mode>(x, scalars, n, std::make_index_sequence<Wide::states>());
}

template <class Wide, class T>
constexpr Functions measures() {
  return {{measure_tile<Wide, T, PLAIN>, measure_tile<Wide, T, L2>, measure_tile<Wide, T, PLAIN>,
           measure_tile<Wide, T, FIRST>, measure_tile<Wide, T, PLAIN>}};
}

template <class Rule, class T, int... M>
constexpr Functions modes(std::integer_sequence<int, M...>) {
  return {{rule_tile<Rule, T, static_cast<Mode>(M)>...}};
}

template <class Rule, Mode mode, class F>
constexpr DirectFunction direct_function() {
  if constexpr (worthwhile<Rule, F>)
    return direct_loop<Rule, mode, F>;
  else
    return nullptr;
}

template <template <class> class R, template <class> class... D, class... F>
constexpr DirectFunctions direct_functions(List<D...>, FormatsList<F...>) {
  if constexpr ((same<R<float>, D<float>> || ...))
    return {{{direct_function<R<float>, PLAIN, F>()...},
             {direct_function<R<float>, L2, F>()...},
             {direct_function<R<float>, DECOUPLED, F>()...},
             {direct_function<R<float>, FIRST, F>()...}}};
  else
    return {};
}

template <class T>
const T* elements(const Summand& part, std::size_t at, T* tile, std::size_t n) {
  const char* const data = part.data + at * part.bytes;
  if (!part.decode) return reinterpret_cast<const T*>(data);
  part.decode(data, nullptr, tile, n);
  return tile;
}

template <class T>
void mean(const void* data, const void* aux, void* out, std::size_t n) {
  const Summands& all = *static_cast<const Summands*>(aux);
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(data) - all.parts->data);
  std::size_t at = offset / all.parts->bytes;
  alignas(64) T first[TILE], next[TILE];
  const T divisor = static_cast<T>(all.divisor), factor = static_cast<T>(all.factor);
  T* to = static_cast<T*>(out);
  for (const std::size_t end = at + n; at < end; at += TILE, to += TILE) {
    const std::size_t count = end - at < TILE ? end - at : TILE;
    const T* sum = elements(all.parts[0], at, first, count);
    for (std::size_t k = 1; k < all.count; ++k, sum = to) {
      const T* const more = elements(all.parts[k], at, next, count);
      OPERANDS_DO_NOT_OVERLAP
      for (std::size_t j = 0; j < count; ++j) to[j] = sum[j] + more[j];
    }
    if (all.factor) {
      OPERANDS_DO_NOT_OVERLAP
      for (std::size_t j = 0; j < count; ++j) to[j] = sum[j] * factor;
    } else {
      OPERANDS_DO_NOT_OVERLAP
      for (std::size_t j = 0; j < count; ++j) to[j] = sum[j] / divisor;
    }
  }
}

template <template <class> class R>
constexpr Operation rule_entry() {
  using All = std::make_integer_sequence<int, MODES>;
  return {R<float>::name,
          2 + R<float>::states,
          RULE,
          written<R<float>>(0),
          2 + fields<R>(),
          {modes<R<float>, float>(All()), modes<R<double>, double>(All())},
          direct_functions<R>(DirectRules(), Directly()),
          {}};
}

template <template <class> class R>
constexpr Operation other_entry() {
  return {R<float>::name,
          2,
          R<float>::filter ? FILTER : OTHER,
          0,
          fields<R>(),
          {{{other_tile<R<float>, float>}}, {{other_tile<R<double>, double>}}},
          {},
          {}};
}

template <template <class> class R>
constexpr Operation sum_entry() {
  return {R<float>::name,
          1 + R<float>::operands,
          SUM,
          0,
          fields<R>(),
          {{{sum_tile<R<float>, float>}}, {{sum_tile<R<double>, double>}}},
          {},
          {sum_segment<R<float>, float>, sum_segment<R<double>, double>}};
}

template <template <class> class R>
constexpr Operation measure_entry() {
  using Wide = R<double>;
  return {Wide::measure_name,
          Wide::sums + 2 + Wide::states,
          MEASURE,
          Wide::sums,
          2 + fields<R>() - Wide::measured,
          {measures<Wide, float>(), measures<Wide, double>()},
          {},
          {}};
}

template <class Rules, class Measured, class Others, class Sums>
struct Operations;
template <template <class> class... R, template <class> class... M, template <class> class... O,
          template <class> class... S>
struct Operations<List<R...>, List<M...>, List<O...>, List<S...>> {
  static constexpr int count = sizeof...(R) + sizeof...(M) + sizeof...(O) + sizeof...(S);
  static constexpr Operation all[] = {rule_entry<R>()..., measure_entry<M>()...,
                                      other_entry<O>()..., sum_entry<S>()...};
};

using Everything = Operations<Rules, Measured, Others, Sums>;

}  // namespace

namespace fusedopt {
extern const Table FUSEDOPT_TABLE;
const Table FUSEDOPT_TABLE = {
    Everything::all,
    Everything::count,
    CODECS,
    static_cast<int>(sizeof CODECS / sizeof *CODECS),
    {orthogonalize<float>, orthogonalize<double>},
    orthogonalize_space,
    Directly::all,
    {mean<float>, mean<double>},
};
}  // namespace fusedopt
