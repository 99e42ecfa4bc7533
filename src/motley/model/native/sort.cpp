// Sorts slots (token * k + choice) by the expert that was chosen. Integers only: compiled once, for every machine.
#include <cstdint>
#include <cstring>

// starts [experts + 1]: where each expert's rows begin; slot_of_row and row_of_slot [slots]. Of one expert in their order.
extern "C" __attribute__((visibility("default"))) void experts_sort(long slots, long experts, const int64_t* chosen,
                                                                    int32_t* starts, int32_t* slot_of_row,
                                                                    int32_t* row_of_slot) {
  std::memset(starts, 0, (experts + 1) * sizeof(int32_t));
  for (long s = 0; s < slots; ++s) ++starts[chosen[s] + 1];
  for (long e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  for (long s = 0; s < slots; ++s) {
    row_of_slot[s] = starts[chosen[s]]++;  // counts up to where the next expert's rows begin
    slot_of_row[row_of_slot[s]] = (int32_t)s;
  }
  for (long e = experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}
