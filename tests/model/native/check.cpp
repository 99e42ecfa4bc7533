// Holds one target's kernels to plain programs of the same equations in double precision, forward and backward, over
// random shapes. Needs neither Python nor PyTorch, so that it runs under a sanitizer and where only an emulator has the
// instructions. `test_native_targets.py` builds and runs it:
//
//     c++ -DTARGET=avx2 -DDTYPE=fp32 check.cpp attention.o experts.o loss.o muon.o norm.o && ./a.out [seed [rounds]]
//
// Prints each tensor's largest errors and a digest of all results; ends with 1 if an error is beyond its tolerance.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define NAME__(kernel, dtype, target) kernel##_##dtype##_##target
#define NAME_(kernel, dtype, target) NAME__(kernel, dtype, target)
#define KERNEL(kernel) NAME_(kernel, DTYPE, TARGET)

// What is allowed, of a tensor's length and of one number, is a few times what was found over hundreds of cases. fp32 is
// rounded by 2^-24 and summed over up to some hundred terms; bf16 by 2^-9 at each of three or four steps between inputs and
// results, so that a tensor of 10,000 numbers has one that is ten times as wrong as the usual.
struct fp32 {
  using type = float;
  static constexpr double LENGTH = 5e-6, ELEMENT = 5e-5;
};
struct bf16 {
  using type = uint16_t;
  static constexpr double LENGTH = 2e-2, ELEMENT = 2e-1;
};
using T = DTYPE::type;
using I32 = int32_t;
using I64 = int64_t;

extern "C" {
void KERNEL(norm_forward)(long, long, const T*, long, const float*, float, T*, float*);
void KERNEL(norm_backward)(long, long, const T*, long, const float*, const float*, const T*, T*, float*, float*);
void KERNEL(attention_forward)(long, long, long, long, long, long, long, float, const T*, const T*, const T*, const T*,
                               const T*, const I64*, T*, float*);
void KERNEL(attention_backward)(long, long, long, long, long, long, long, float, const T*, const T*, const T*, const T*,
                                const T*, const I64*, const T*, const float*, const T*, T*, T*, T*, float*);
void experts_sort(long, long, const I64*, I32*, I32*, I32*);
void KERNEL(experts_forward)(long, long, long, long, long, const T*, const float*, const float*, const float*, const float*,
                             const I32*, const I32*, const I32*, T*, T*);
void KERNEL(experts_backward)(long, long, long, long, long, const T*, const float*, const float*, const float*,
                              const float*, const I32*, const I32*, const I32*, const T*, const T*, T*, float*, float*,
                              float*);
void KERNEL(loss_forward)(long, long, long, long, const T*, const float*, const I64*, long, float, const float*, const I32*,
                          const float*, const float*, const I64*, const I64*, const float*, float, float*, float*, T*,
                          float*);
void KERNEL(muon_step)(long, const I64*, const float* const*, void* const*, float* const*, const float*, float, float, long,
                       long);
}

static double wide(float x) { return x; }
static double wide(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static void put(float& to, double x) { to = (float)x; }
static void put(uint16_t& to, double x) {  // to the nearest, ties to even
  const float y = (float)x;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  to = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static std::mt19937_64 generator;
static long between(long least, long most) { return std::uniform_int_distribution<long>(least, most)(generator); }
static bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
static long one_of(std::initializer_list<long> choices) { return choices.begin()[between(0, (long)choices.size() - 1)]; }
static long rows_at_most(long most) {  // beside every tile's edge, and anything
  return std::min(most, chance(0.5) ? one_of({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) : between(1, most));
}

// Numbers of a kernel: not aligned, between guards that must stay as they are and are poison to whoever reads them (ones
// everywhere: not a number). So is what a kernel has yet to write. Under AddressSanitizer, which knows better, no guards.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t GUARD = 0;
#else
constexpr size_t GUARD = 256;
#endif
template <class N>
class Room {
  size_t shift;
  std::unique_ptr<unsigned char[]> all;

 public:
  size_t size;
  explicit Room(size_t size)
      : shift(GUARD + sizeof(N) * between(0, 15)), all(new unsigned char[shift + size * sizeof(N) + GUARD]), size(size) {
    std::memset(all.get(), 0xff, shift + size * sizeof(N) + GUARD);
  }
  N* data() const { return (N*)(all.get() + shift); }
  N& operator[](size_t i) const { return data()[i]; }
  bool whole() const {
    const auto poison = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(all.get(), all.get() + shift, poison) &&
           std::all_of((unsigned char*)(data() + size), (unsigned char*)(data() + size) + GUARD, poison);
  }
};

// Small integers are exact in every format, so that scores and logits may be hundreds apart (where exponentials vanish) and
// still be known. A poisoned case has one NaN among its inputs, which must not be lost: training looks for it.
enum class Numbers { ordinary, integers, poisoned };
static Numbers numbers;
static bool poison;  // has yet to be put somewhere
template <class N>
static Room<N> random_numbers(size_t size, double spread = 1) {
  Room<N> room(size);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < size; ++i)
    put(room[i], numbers == Numbers::integers ? (double)between(-3, 3) : spread * normal(generator));
  if (poison && size) put(room[between(0, size - 1)], NAN), poison = false;
  return room;
}
template <class N>
static Room<N> same_numbers(size_t size, double number) {
  Room<N> room(size);
  for (size_t i = 0; i < size; ++i) put(room[i], number);
  return room;
}

using Vector = std::vector<double>;
template <class N>
static Vector wide(const Room<N>& room) {
  Vector numbers(room.size);
  for (size_t i = 0; i < room.size; ++i) numbers[i] = wide(room[i]);
  return numbers;
}
static double length(const Vector& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

struct Errors {
  double length = 0, element = 0;
};
static std::map<std::string, Errors> largest;
static std::string shape;  // of the case at hand
static bool failed = false;
static uint64_t digest = 14695981039346656037u;

static void fail(const std::string& what, const std::string& why) {
  failed = true;
  std::printf("FAILED %s_%s_%s: %s\n    %s\n", what.c_str(), TEXT(DTYPE), TEXT(TARGET), why.c_str(), shape.c_str());
}

// Two errors. The difference's length over the expected one's; and the largest difference of a single number over its own
// size plus the usual one of its tensor, which sees a lone wrong lane. Where terms cancel (a token that sees itself only
// learns nothing from its score), rounding is as large as they are: `terms` is their length.
template <class N>
static void compare(const std::string& what, const Room<N>& found, const Vector& expected, double terms = 0, double easier = 1) {
  if (!found.whole()) fail(what, "wrote beyond its end");
  if (expected.empty()) return;
  Vector difference = wide(found);
  if (numbers == Numbers::poisoned) {
    for (size_t i = 0; i < expected.size(); ++i)
      if (std::isnan(expected[i]) && !std::isnan(difference[i]))
        return fail(what, "a NaN was lost: number " + std::to_string(i) + " is " + std::to_string(difference[i]));
    return;
  }
  for (size_t i = 0; i < found.size * sizeof(N); ++i) digest = (digest ^ ((unsigned char*)found.data())[i]) * 1099511628211u;
  for (size_t i = 0; i < expected.size(); ++i) difference[i] -= expected[i];
  const double size = std::max({length(expected), terms / 4, 1e-30}), usual = size / std::sqrt((double)expected.size());
  Errors errors{length(difference) / size, 0};
  size_t worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(difference[i]) / (usual + std::abs(expected[i]));
    if (!(error <= errors.element)) errors.element = error, worst = i;
    if (std::isnan(error)) break;
  }
  Errors& most = largest[what];
  if (!(errors.length <= most.length)) most.length = errors.length;
  if (!(errors.element <= most.element)) most.element = errors.element;
  if (!(errors.length <= DTYPE::LENGTH * easier && errors.element <= DTYPE::ELEMENT * easier)) {
    char why[200];
    std::snprintf(why, sizeof why, "errors %.2e (length) and %.2e (number %zu of %zu: %.6g, expected %.6g)", errors.length,
                  errors.element, worst, expected.size(), wide(found[worst]), expected[worst]);
    fail(what, why);
  }
}
static void describe(const char* kernel, std::initializer_list<std::pair<const char*, long>> sizes) {
  shape = kernel;
  for (const auto& size : sizes) shape += std::string(" ") + size.first + " " + std::to_string(size.second);
  shape += numbers == Numbers::integers ? ", integers" : numbers == Numbers::poisoned ? ", one NaN" : "";
}

// y = x / sqrt(mean x^2 + eps) * weight; dx = (g w - u mean(g w u)) / rms with u = x / rms; dw = sum of g u.
static void check_norm() {
  const long rows = rows_at_most(300), size = 16 * between(1, 9), width = size + one_of({0, 0, 1, 8, 24});
  const float eps = 1e-5f;
  describe("norm", {{"rows", rows}, {"size", size}, {"width", width}});
  const auto x = random_numbers<T>((rows - 1) * width + size), grad = random_numbers<T>(rows * size);
  const auto weight = random_numbers<float>(size);
  Room<T> y(rows * size), grad_x(rows * size);
  Room<float> inverse(rows), grad_weight(size), parts((rows + 63) / 64 * size);
  KERNEL(norm_forward)(rows, size, x.data(), width, weight.data(), eps, y.data(), inverse.data());
  KERNEL(norm_backward)(rows, size, x.data(), width, weight.data(), inverse.data(), grad.data(), grad_x.data(), grad_weight.data(), parts.data());
  Vector want_y(y.size), want_x(y.size), want_weight(size), terms(y.size);
  for (long r = 0; r < rows; ++r) {
    const auto at = [&](long j) { return wide(x[r * width + j]); };
    const auto g = [&](long j) { return wide(grad[r * size + j]); };
    double square = 0, along = 0;
    for (long j = 0; j < size; ++j) square += at(j) * at(j) / (double)size;
    const double by = 1 / std::sqrt(square + eps);
    for (long j = 0; j < size; ++j) along += g(j) * weight[j] * at(j) * by / (double)size;
    for (long j = 0; j < size; ++j) {
      const size_t i = (r * size + j);
      want_y[i] = at(j) * by * weight[j];
      want_x[i] = (g(j) * weight[j] - at(j) * by * along) * by;
      terms[i] = g(j) * weight[j] * by;
      want_weight[j] += g(j) * at(j) * by;
    }
  }
  compare("norm_forward y", y, want_y);
  compare("norm_backward grad_x", grad_x, want_x, length(terms));
  compare("norm_backward grad_weight", grad_weight, want_weight);
  if (!parts.whole()) fail("norm_backward", "wrote beyond its room");
}

// One (row, head)'s queries, keys and values [seq, ...]: pairs of the rotated part are neighbours, (x0, x1) by angle a is
// (x0 cos a - x1 sin a, x1 cos a + x0 sin a).
static void rotate(double* x, const T* cos, const T* sin, long rope, bool back) {
  for (long p = 0; p < rope / 2; ++p) {
    const double c = wide(cos[p]), s = back ? -wide(sin[p]) : wide(sin[p]), first = x[2 * p], second = x[2 * p + 1];
    x[2 * p] = first * c - second * s;
    x[2 * p + 1] = second * c + first * s;
  }
}

// S = Q K^T scale, P = softmax over earlier tokens of the same document, O = P V; dV = P^T dO, dP = dO V^T,
// dS = P (dP - sum P dP), dQ = dS K scale, dK = dS^T Q scale.
static void check_attention() {
  const long batch = between(1, 2), seq = rows_at_most(200), heads = between(1, 3);
  const long nope = 16 * between(1, 3), rope = 16 * between(1, 2), value = 16 * between(1, 4), qk = nope + rope;
  const long latent_width = rope + one_of({0, 1, 16, 33}), tokens = batch * seq;
  const bool integers = numbers == Numbers::integers;
  const float scale = integers ? 0.5f : (float)(1.5 / std::sqrt((double)qk));
  const long longest = one_of({0, 1, 20, seq});  // document; 0: none are given
  describe("attention", {{"batch", batch}, {"seq", seq}, {"heads", heads}, {"nope", nope}, {"rope", rope}, {"value", value},
                         {"latent_width", latent_width}, {"longest document", longest}});
  const auto q = random_numbers<T>(tokens * heads * qk), kv = random_numbers<T>(tokens * heads * (nope + value));
  const auto k_rope = random_numbers<T>((tokens - 1) * latent_width + rope), grad = random_numbers<T>(tokens * heads * value);
  Room<T> cos(seq * rope / 2), sin(seq * rope / 2);
  for (size_t i = 0; i < cos.size; ++i) {
    const double angle = integers ? std::acos(0.0) * (double)between(0, 3) : (double)between(0, 1000);
    put(cos[i], integers ? std::round(std::cos(angle)) : std::cos(angle));
    put(sin[i], integers ? std::round(std::sin(angle)) : std::sin(angle));
  }
  Room<I64> documents(tokens);
  for (long b = 0; b < batch; ++b)
    for (long t = 0, left = 0, document = between(-2, 2); t < seq; ++t, --left) {
      if (left == 0) left = between(1, std::max(1L, longest)), document += 1;
      documents[b * seq + t] = document;
    }
  const I64* given = longest ? documents.data() : nullptr;
  Room<T> out(tokens * heads * value), grad_q(q.size), grad_kv(kv.size), grad_k_rope(tokens * rope);
  Room<float> logs(tokens * heads), by_head(tokens * heads * rope);
  KERNEL(attention_forward)(batch, seq, heads, nope, rope, value, latent_width, scale, q.data(), kv.data(), k_rope.data(),
                            cos.data(), sin.data(), given, out.data(), logs.data());
  KERNEL(attention_backward)(batch, seq, heads, nope, rope, value, latent_width, scale, q.data(), kv.data(), k_rope.data(),
                             cos.data(), sin.data(), given, out.data(), logs.data(), grad.data(), grad_q.data(),
                             grad_kv.data(), grad_k_rope.data(), by_head.data());
  Vector want_out(out.size), want_logs(logs.size), want_q(q.size), want_kv(kv.size), want_rope(grad_k_rope.size);
  double terms_q = 0, terms_k = 0;  // squared lengths
  for (long b = 0; b < batch; ++b)
    for (long h = 0; h < heads; ++h) {
      Vector queries(seq * qk), keys(queries.size()), values(seq * value), upstream(values.size());
      Vector slopes_q(queries.size()), slopes_k(keys.size()), slopes_v(values.size());
      for (long t = 0; t < seq; ++t) {
        const size_t token = (b * seq + t), at = token * heads + h;
        for (long j = 0; j < qk; ++j) {
          queries[t * qk + j] = wide(q[at * qk + j]);
          keys[t * qk + j] = j < nope ? wide(kv[at * (nope + value) + j]) : wide(k_rope[token * latent_width + (j - nope)]);
        }
        for (long j = 0; j < value; ++j) {
          values[t * value + j] = wide(kv[at * (nope + value) + (nope + j)]);
          upstream[t * value + j] = wide(grad[at * value + j]);
        }
        rotate(&queries[t * qk + nope], &cos[t * rope / 2], &sin[t * rope / 2], rope, false);
        rotate(&keys[t * qk + nope], &cos[t * rope / 2], &sin[t * rope / 2], rope, false);
      }
      for (long t = 0; t < seq; ++t) {
        const size_t at = (b * seq + t) * heads + h;
        std::vector<long> seen;
        for (long j = 0; j <= t; ++j)
          if (!given || given[b * seq + j] == given[b * seq + t]) seen.push_back(j);
        Vector p(t + 1), of_p(t + 1);
        double top = -INFINITY, total = 0, along = 0;
        for (long j : seen) {
          for (long i = 0; i < qk; ++i) p[j] += queries[t * qk + i] * keys[j * qk + i] * scale;
          top = std::max(top, p[j]);
        }
        for (long j : seen) total += p[j] = std::exp(p[j] - top);
        want_logs[(b * heads + h) * seq + t] = top + std::log(total);
        for (long j : seen) {
          p[j] /= total;
          for (long i = 0; i < value; ++i) {
            want_out[at * value + i] += p[j] * values[j * value + i];
            slopes_v[j * value + i] += p[j] * upstream[t * value + i];
            of_p[j] += upstream[t * value + i] * values[j * value + i];
          }
          along += p[j] * of_p[j];
        }
        for (long j : seen) {
          const double slope = p[j] * (of_p[j] - along) * scale, term = p[j] * of_p[j] * scale;
          for (long i = 0; i < qk; ++i) {
            slopes_q[t * qk + i] += slope * keys[j * qk + i];
            slopes_k[j * qk + i] += slope * queries[t * qk + i];
            terms_q += std::pow(term * keys[j * qk + i], 2);
            terms_k += std::pow(term * queries[t * qk + i], 2);
          }
        }
      }
      for (long t = 0; t < seq; ++t) {
        const size_t token = (b * seq + t), at = token * heads + h;
        rotate(&slopes_q[t * qk + nope], &cos[t * rope / 2], &sin[t * rope / 2], rope, true);
        rotate(&slopes_k[t * qk + nope], &cos[t * rope / 2], &sin[t * rope / 2], rope, true);
        for (long j = 0; j < qk; ++j) {
          want_q[at * qk + j] = slopes_q[t * qk + j];
          (j < nope ? want_kv[at * (nope + value) + j] : want_rope[token * rope + (j - nope)]) += slopes_k[t * qk + j];
        }
        for (long j = 0; j < value; ++j) want_kv[at * (nope + value) + (nope + j)] = slopes_v[t * value + j];
      }
    }
  compare("attention_forward out", out, want_out);
  compare("attention_forward logs", logs, want_logs);
  compare("attention_backward grad_q", grad_q, want_q, std::sqrt(terms_q));
  compare("attention_backward grad_kv", grad_kv, want_kv, std::sqrt(terms_k));
  compare("attention_backward grad_k_rope", grad_k_rope, want_rope, std::sqrt(terms_k));
  if (!by_head.whole()) fail("attention_backward", "wrote beyond its room");
}

struct Routing {
  long slots, experts;
  Room<I64> chosen;
  Room<I32> starts, slot_of_row, row_of_slot;
};

static Routing routed(long tokens, long k, long experts) {
  const long slots = tokens * k;
  Routing r{slots, experts, Room<I64>(slots), Room<I32>(experts + 1), Room<I32>(slots), Room<I32>(slots)};
  std::vector<I64> order(experts);
  for (long e = 0; e < experts; ++e) order[e] = e;
  std::shuffle(order.begin(), order.end(), generator);
  const long busy = between(k, experts);  // the others stay empty
  for (long t = 0; t < tokens; ++t) {
    std::shuffle(order.begin(), order.begin() + busy, generator);
    std::copy(order.begin(), order.begin() + k, r.chosen.data() + t * k);
  }
  experts_sort(slots, experts, r.chosen.data(), r.starts.data(), r.slot_of_row.data(), r.row_of_slot.data());
  long row = 0;
  bool right = r.starts.whole() && r.slot_of_row.whole() && r.row_of_slot.whole();
  for (long e = 0; e < experts; ++e) {
    right = right && r.starts[e] == row;
    for (long s = 0; s < slots; ++s)
      if (r.chosen[s] == e) right = right && r.slot_of_row[row] == s && r.row_of_slot[s] == row, ++row;
  }
  if (!right || r.starts[experts] != slots) fail("experts_sort", "the rows are not the slots sorted by expert");
  return r;
}

// For each slot (token, expert, weight): G = Wg x, U = Wu x, y += weight Wd (silu(G) U); and the chain rule back.
static void check_experts() {
  const bool dense = chance(0.3);
  const long experts = dense ? 1 : between(2, 6), k = dense ? 1 : between(1, std::min(3L, experts));
  const long tokens = !dense && chance(0.05) ? 0 : rows_at_most(200), hidden = 16 * between(1, 5), inner = 16 * between(1, 7);
  describe(dense ? "dense MLP" : "experts", {{"tokens", tokens}, {"k", k}, {"experts", experts}, {"hidden", hidden}, {"inner", inner}});
  const Routing routing = routed(tokens, k, experts);
  const double spread = 1 / std::sqrt((double)hidden);
  const auto x = random_numbers<T>(tokens * hidden), grad_y = random_numbers<T>(tokens * hidden);
  const auto gate_up_proj = random_numbers<float>(experts * 2 * inner * hidden, 2 * spread);
  const auto up_apart = random_numbers<float>(inner * hidden, 2 * spread), down_proj = random_numbers<float>(experts * hidden * inner, spread);
  const auto weights = random_numbers<float>(routing.slots);
  const float *gate = gate_up_proj.data(), *up = dense ? up_apart.data() : gate + inner * hidden;
  Room<T> kept(routing.slots * 2 * inner), y(x.size), grad_x(x.size);
  Room<float> grad_weights(dense ? 0 : routing.slots), grad_gate_up(gate_up_proj.size), grad_down(down_proj.size);
  const auto none = [&](auto* pointer) { return dense ? nullptr : pointer; };
  KERNEL(experts_forward)(tokens, k, experts, hidden, inner, x.data(), none(weights.data()), gate, up, down_proj.data(),
                          routing.starts.data(), none(routing.slot_of_row.data()), none(routing.row_of_slot.data()), kept.data(), y.data());
  KERNEL(experts_backward)(tokens, k, experts, hidden, inner, x.data(), none(weights.data()), gate, up, down_proj.data(),
                           routing.starts.data(), none(routing.slot_of_row.data()), none(routing.row_of_slot.data()), kept.data(),
                           grad_y.data(), grad_x.data(), none(grad_weights.data()), grad_gate_up.data(), grad_down.data());
  Vector want_y(x.size), want_x(x.size), want_weights(grad_weights.size), want_gate_up(grad_gate_up.size), want_down(grad_down.size);
  for (long s = 0; s < routing.slots; ++s) {
    const long t = s / k, e = routing.chosen[s];
    const double weight = dense ? 1 : wide(weights[s]);
    for (long i = 0; i < inner; ++i) {
      const float *wg = gate + (e * 2 * inner + i) * hidden, *wu = up + (e * 2 * inner + i) * hidden;
      double g = 0, u = 0, upstream = 0;
      for (long j = 0; j < hidden; ++j) {
        g += wg[j] * wide(x[t * hidden + j]);
        u += wu[j] * wide(x[t * hidden + j]);
        upstream += wide(down_proj[(e * hidden + j) * inner + i]) * wide(grad_y[t * hidden + j]);
      }
      const double sigmoid = 1 / (1 + std::exp(-g)), silu = g * sigmoid;
      const double of_gate = weight * upstream * u * sigmoid * (1 + g * (1 - sigmoid)), of_up = weight * upstream * silu;
      if (!dense) want_weights[s] += upstream * silu * u;
      for (long j = 0; j < hidden; ++j) {
        want_y[t * hidden + j] += weight * silu * u * down_proj[(e * hidden + j) * inner + i];
        want_down[(e * hidden + j) * inner + i] += weight * silu * u * wide(grad_y[t * hidden + j]);
        want_x[t * hidden + j] += of_gate * wg[j] + of_up * wu[j];
        want_gate_up[(e * 2 * inner + i) * hidden + j] += of_gate * wide(x[t * hidden + j]);
        want_gate_up[(e * 2 * inner + inner + i) * hidden + j] += of_up * wide(x[t * hidden + j]);
      }
    }
  }
  compare("experts_forward y", y, want_y);
  compare("experts_backward grad_x", grad_x, want_x);
  compare("experts_backward grad_weights", grad_weights, want_weights);
  compare("experts_backward grad_gate_up", grad_gate_up, want_gate_up);
  compare("experts_backward grad_down", grad_down, want_down);
  if (!kept.whole()) fail("experts_forward", "wrote beyond what is kept");
}

// Cross-entropy with a target distribution: 1 - weight at the target, and weight times what is expected, which is floor of
// a distribution over the vocabulary and factors of sparse rows. d loss / d logits = softmax - target distribution.
static void check_loss() {
  const bool hinted = chance(0.5), wanted = chance(0.85);
  const long positions = rows_at_most(200), size = 16 * between(1, 6), vocab = 16 * between(1, 25), group = 32 * one_of({1, 2, 3, 100});
  const long orders = 2;
  const float weight = hinted ? 0.3f : 0, slope = (float)std::exp2(-(double)between(0, 8));
  describe("loss", {{"positions", positions}, {"size", size}, {"vocab", vocab}, {"group", group}, {"hinted", hinted}, {"wanted", wanted}});
  const auto hidden = random_numbers<T>(positions * size);
  const auto head = random_numbers<float>(vocab * size, 2 / std::sqrt((double)size));
  Room<I64> targets(positions), begins(positions * orders), ends(positions * orders);
  Room<float> vocabulary(vocab), floor(positions), factors(positions * orders);
  for (long c = 0; c < vocab; ++c) vocabulary[c] = 1.0f / (float)vocab;
  std::vector<I32> entries;
  std::vector<long> tokens_of_all(vocab);
  for (long c = 0; c < vocab; ++c) tokens_of_all[c] = c;
  for (long r = 0; r < positions; ++r) {
    targets[r] = chance(0.2) ? one_of({0, vocab - 1}) : between(0, vocab - 1);
    floor[r] = 0.5f;
    for (long o = r * orders; o < (r + 1) * orders; ++o) {
      const long count = std::min(vocab, chance(0.2) ? 0 : between(1, 40));
      std::shuffle(tokens_of_all.begin(), tokens_of_all.end(), generator);
      factors[o] = count ? 0.25f : 0.0f;
      begins[o] = (long)entries.size();
      entries.insert(entries.end(), tokens_of_all.begin(), tokens_of_all.begin() + count);
      ends[o] = (long)entries.size();
    }
  }
  Room<I32> tokens(entries.size());
  Room<float> shares(entries.size());
  std::copy(entries.begin(), entries.end(), tokens.data());
  for (long o = 0; o < positions * orders; ++o)
    for (long i = begins[o]; i < ends[o]; ++i) shares[i] = 1.0f / (float)(ends[o] - begins[o]);
  Room<float> learned(positions), seen(positions);
  Room<T> grad_hidden(wanted ? hidden.size : 0);
  const auto grad_head = same_numbers<float>(wanted ? head.size : 0, 0);
  const auto given = [&](auto* pointer) { return hinted ? pointer : nullptr; };
  KERNEL(loss_forward)(positions, size, vocab, group, hidden.data(), head.data(), targets.data(), orders, weight,
                       given(vocabulary.data()), given(tokens.data()), given(shares.data()), given(floor.data()),
                       given(begins.data()), given(ends.data()), given(factors.data()), slope, learned.data(), seen.data(),
                       wanted ? grad_hidden.data() : nullptr, wanted ? grad_head.data() : nullptr);
  Vector want_learned(positions), want_seen(positions), want_hidden(grad_hidden.size), want_head(grad_head.size);
  for (long r = 0; r < positions; ++r) {
    Vector logits(vocab), aim(vocab);
    for (long c = 0; c < vocab; ++c) {
      for (long j = 0; j < size; ++j) logits[c] += wide(hidden[r * size + j]) * head[c * size + j];
      if (hinted) aim[c] = weight * floor[r] * vocabulary[c];
    }
    aim[targets[r]] += 1 - weight;
    for (long o = r * orders; hinted && o < (r + 1) * orders; ++o)
      for (long i = begins[o]; i < ends[o]; ++i) aim[tokens[i]] += weight * factors[o] * shares[i];
    const double top = *std::max_element(logits.begin(), logits.end());
    double total = 0, all = 0, along = 0;  // what is aimed at may sum to less than one
    for (long c = 0; c < vocab; ++c) total += std::exp(logits[c] - top), all += aim[c], along += aim[c] * logits[c];
    want_seen[r] = top + std::log(total) - logits[targets[r]];
    want_learned[r] = top + std::log(total) - along;
    for (long c = 0; wanted && c < vocab; ++c)
      for (long j = 0; j < size; ++j) {
        const double by = slope * (std::exp(logits[c] - top) / total - aim[c]);
        want_hidden[r * size + j] += by * head[c * size + j];
        want_head[c * size + j] += by * wide(hidden[r * size + j]);
      }
  }
  compare("loss_forward learned", learned, want_learned);
  compare("loss_forward seen", seen, want_seen);
  compare("loss_forward grad_hidden", grad_hidden, want_hidden);
  compare("loss_forward grad_head", grad_head, want_head);
}

static Vector product(long m, long k, long n, const Vector& a, const Vector& b, bool transposed) {  // a b, or a b^T
  Vector c(m * n);
  for (long i = 0; i < m; ++i)
    for (long l = 0; l < k; ++l)
      for (long j = 0; j < n; ++j) c[i * n + j] += a[i * k + l] * b[transposed ? j * k + l : l * n + j];
  return c;
}

// m <- m + (g - m)(1 - momentum), x = g + (m - g) momentum over its length, five times x <- a x + (b G + c G G) x with
// G = x x^T, w <- w kept - rate x. What is compared of w is x.
static void check_muon() {
  const long count = between(1, 4), iterations = 5, narrow = chance(0.5);
  const float momentum = 0.95f, kept = 0.99f;
  describe("muon", {{"matrices", count}, {"momenta in bf16", narrow}});
  std::vector<Room<float>> gradients, weights, wide_momenta;
  std::vector<Room<uint16_t>> narrow_momenta;
  std::vector<const float*> of_gradients;
  std::vector<float*> of_weights;
  std::vector<void*> of_momenta;
  Room<I64> sizes(2 * count);
  Room<float> rates(count);
  std::vector<Vector> before, old;
  for (long i = 0; i < count; ++i) {
    const long rows = 16 * between(1, 6), columns = 16 * between(1, 6), numbers = rows * columns;
    shape += ", " + std::to_string(rows) + " x " + std::to_string(columns);
    const bool nothing = i == 0 && chance(0.2);
    sizes[2 * i] = rows, sizes[2 * i + 1] = columns, rates[i] = 0.5f;
    gradients.push_back(nothing ? same_numbers<float>(numbers, 0) : random_numbers<float>(numbers, 1e-3));
    weights.push_back(random_numbers<float>(numbers));
    narrow_momenta.push_back(nothing ? same_numbers<uint16_t>(numbers, 0) : random_numbers<uint16_t>(numbers, 1e-3));
    wide_momenta.push_back(nothing ? same_numbers<float>(numbers, 0) : random_numbers<float>(numbers, 1e-3));
    of_gradients.push_back(gradients[i].data()), of_weights.push_back(weights[i].data());
    of_momenta.push_back(narrow ? (void*)narrow_momenta[i].data() : (void*)wide_momenta[i].data());
    before.push_back(wide(weights[i])), old.push_back(narrow ? wide(narrow_momenta[i]) : wide(wide_momenta[i]));
  }
  KERNEL(muon_step)(count, sizes.data(), of_gradients.data(), of_momenta.data(), of_weights.data(), rates.data(), momentum, kept, iterations, narrow);
  for (long i = 0; i < count; ++i) {
    const bool tall = sizes[2 * i] > sizes[2 * i + 1];
    const long rows = sizes[2 * i], columns = sizes[2 * i + 1], m = std::min(rows, columns), n = std::max(rows, columns), numbers = rows * columns;
    Vector now(numbers), x(numbers), ahead(numbers), update(numbers);
    for (long j = 0; j < numbers; ++j) {
      now[j] = old[i][j] + (gradients[i][j] - old[i][j]) * (1 - (double)momentum);
      ahead[j] = gradients[i][j] + (now[j] - gradients[i][j]) * (double)momentum;
    }
    const double over = length(ahead) + 1e-7;
    for (long j = 0; j < numbers; ++j) x[tall ? j % columns * rows + j / columns : j] = ahead[j] / over;
    for (long step = 0; step < iterations; ++step) {
      Vector gram = product(m, n, m, x, x, true);
      const Vector square = product(m, m, m, gram, gram, false);
      for (long j = 0; j < m * m; ++j) gram[j] = -4.7750 * gram[j] + 2.0315 * square[j];
      const Vector turned = product(m, m, n, gram, x, false);
      for (long j = 0; j < numbers; ++j) x[j] = 3.4445 * x[j] + turned[j];
    }
    for (long j = 0; j < numbers; ++j) {
      update[j] = x[tall ? j % columns * rows + j / columns : j];
      weights[i][j] = (float)((before[i][j] * (double)kept - weights[i][j]) / rates[i]);
    }
    // five iterations make small singular values, and what rounding put there, up to 3.4445^5 times as large
    compare("muon_step update", weights[i], update, std::sqrt((double)m), 3);
    if (narrow)
      compare("muon_step momentum in bf16", narrow_momenta[i], now, 0, bf16::LENGTH / DTYPE::LENGTH);
    else
      compare("muon_step momentum", wide_momenta[i], now);
  }
}

// Linux lends the registers of AMX to a process that asks for them.
static void ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  if (std::string(TEXT(TARGET)) == "amx") syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */);
#endif
}

int main(int count, char** arguments) {
  const unsigned long seed = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 0, rounds = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 20;
  std::printf("%s on %s, seed %lu, %lu rounds\n", TEXT(DTYPE), TEXT(TARGET), seed, rounds);
  ask_for_tiles();
  generator.seed(seed);
  for (unsigned long round = 0; round < rounds; ++round)
    for (const auto check : {check_norm, check_attention, check_experts, check_loss, check_muon}) {
      numbers = round % 8 == 3 ? Numbers::poisoned : round % 2 && check != check_muon ? Numbers::integers : Numbers::ordinary;
      poison = numbers == Numbers::poisoned;
      check();
    }
  std::printf("largest errors: of a tensor's length, of one number (allowed: %.0e, %.0e)\n", DTYPE::LENGTH, DTYPE::ELEMENT);
  for (const auto& [what, errors] : largest) std::printf("  %-32s %.1e  %.1e\n", what.c_str(), errors.length, errors.element);
  std::printf("digest %016llx\n%s\n", (unsigned long long)digest, failed ? "FAILED" : "passed");
  return failed;
}
