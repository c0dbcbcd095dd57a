// Reads memory as fast as a core can: the sum keeps the compiler from leaving the reads out.
#include <stddef.h>
#include <stdint.h>

enum { LANES = 64 };

uint64_t read_words(const uint64_t *words, size_t count, size_t repetitions) {
    uint64_t sums[LANES] = {0};
    for (size_t repetition = 0; repetition < repetitions; repetition++) {
        for (size_t first = 0; first + LANES <= count; first += LANES)
            for (size_t lane = 0; lane < LANES; lane++) sums[lane] += words[first + lane];
        __asm__ volatile("" ::: "memory");
    }
    uint64_t sum = 0;
    for (size_t lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}
