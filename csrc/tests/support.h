// What the judge of the tiers stands on: a count of failures, arrays that end where memory ends, random numbers, errors.
#ifndef FASTLORA_TESTS_SUPPORT_H
#define FASTLORA_TESTS_SUPPORT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "../cpu/common.h"

namespace {

const double UNIT[] = {0x1p-24, 0x1p-8, 0x1p-11};

int64_t checks = 0, failures = 0;
std::string context;

void require(bool good, const std::string& what) {
    ++checks;
    if (good) return;
    if (++failures <= 40) fprintf(stderr, "FAILED %s: %s\n", context.c_str(), what.c_str());
}

// --- memory ----------------------------------------------------------------------------------------------------------

// An array that ends where memory ends; what lies before it must stay as it was.
template <class T>
struct Array {
    int64_t count = 0;
    T* data = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    explicit Array(int64_t n) : count(n), data((T*)malloc((size_t)n * sizeof(T))) {}
    ~Array() { free(data); }
#else
    char* pages = nullptr;
    size_t mapped = 0, before = 0;
    explicit Array(int64_t n) : count(n) {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = (size_t)n * sizeof(T);
        mapped = (bytes + 64 + page - 1) / page * page;
        pages = (char*)mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED || mprotect(pages + mapped, page, PROT_NONE)) abort();
        before = mapped - bytes;
        memset(pages, 0xa5, before);
        data = (T*)(pages + before);
    }
    ~Array() {
        for (size_t i = before - 64; i < before; ++i) require((unsigned char)pages[i] == 0xa5, "wrote before an array");
        munmap(pages, mapped + (size_t)sysconf(_SC_PAGESIZE));
    }
#endif
    Array(Array&& other) : count(0) { swap(other); }
    Array& operator=(Array&& other) {
        swap(other);
        return *this;
    }
    void swap(Array& other) {
        char mine[sizeof(Array)];
        memcpy(mine, (void*)this, sizeof mine), memcpy((void*)this, (void*)&other, sizeof mine);
        memcpy((void*)&other, mine, sizeof mine);
    }
    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
    Array& fill(int byte) {
        memset((void*)data, byte, (size_t)count * sizeof(T));
        return *this;
    }
};
typedef Array<float> Floats;
typedef Array<uint8_t> Bytes;
typedef std::vector<double> Doubles;

template <class T>
bool same(const Array<T>& a, const Array<T>& b) {
    return a.count == b.count && !memcmp(a.data, b.data, (size_t)a.count * sizeof(T));
}

// Equal bits, any NaN like any other.
bool same_numbers(const Bytes& a, const Bytes& b, int64_t dtype) {
    const int64_t count = a.count / item_size(dtype);
    for (int64_t i = 0; i < count; ++i) {
        const float x = to_f32_one(a.data, dtype, i), y = to_f32_one(b.data, dtype, i);
        if (bits_of(x) != bits_of(y) && !(x != x && y != y)) return false;
    }
    return true;
}

// --- numbers ---------------------------------------------------------------------------------------------------------

uint64_t state = 1;
double uniform() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
float normal() { return (float)(sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform())); }

Floats randoms(int64_t count, double factor = 1) {
    Floats v(count);
    for (int64_t i = 0; i < count; ++i) v[i] = (float)(normal() * factor);
    return v;
}
Bytes typed(const Floats& v, int64_t dtype) {
    Bytes out(v.count * item_size(dtype));
    for (int64_t i = 0; i < v.count; ++i) from_f32_one(v[i], out.data, dtype, i);
    return out;
}
Bytes poison(int64_t count, int64_t dtype) { return std::move(Bytes(count * item_size(dtype)).fill(0xff)); }  // NaN
Floats poison(int64_t count) { return std::move(Floats(count).fill(0xff)); }

// Norm-wise error, of everything and (with four times as much) of the worst row; NaN exactly where it must be.
void close(const char* name, const void* actual, int64_t dtype, const Doubles& expected, int64_t rows, double budget) {
    const int64_t columns = rows ? (int64_t)expected.size() / rows : 0;
    double total = 0, size = 0, worst = 0;
    for (int64_t i = 0; i < rows; ++i) {
        double row = 0;
        for (int64_t j = 0; j < columns; ++j) {
            const double e = expected[(size_t)(i * columns + j)], a = to_f32_one(actual, dtype, i * columns + j);
            if (e != e || a != a) {
                require(e != e && a != a, std::string(name) + " is NaN where it must not be, or the reverse");
                if (a != a && e == e) return;
                continue;
            }
            row += (a - e) * (a - e), size += e * e;
        }
        total += row;
        worst = row > worst ? row : worst;
    }
    if (!rows || !columns) return;
    char text[160];
    snprintf(text, sizeof text, "%s: error %.3g of %.3g allowed, worst row %.3g", name, sqrt(total / size), budget,
             sqrt(worst / size * (double)rows));
    require(total <= budget * budget * size && worst <= 16 * budget * budget * size / (double)rows, text);
}

}  // namespace

#endif
