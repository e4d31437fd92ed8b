/* What tcc compiles: the C library's headers, and functions of several kinds (generated ones follow). */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct node { struct node *left, *right; uint32_t key; char name[16]; };

static struct node *insert(struct node *node, uint32_t key)
{
    if (!node) {
        node = calloc(1, sizeof *node);
        node->key = key;
        snprintf(node->name, sizeof node->name, "n%" PRIu32, key);
        return node;
    }
    if (key < node->key)
        node->left = insert(node->left, key);
    else if (key > node->key)
        node->right = insert(node->right, key);
    return node;
}

static uint32_t depth(const struct node *node)
{
    if (!node)
        return 0;
    uint32_t l = depth(node->left), r = depth(node->right);
    return 1 + (l > r ? l : r);
}

uint32_t generated(uint32_t a, uint32_t b);

int main(void)
{
    struct node *tree = NULL;
    uint32_t x = 1;
    for (int i = 0; i < 1000; i++) {
        x = x * 1103515245u + 12345u;
        tree = insert(tree, x >> 8);
    }
    printf("%" PRIu32 " %s %" PRIu32 "\n", depth(tree), tree->name, generated(3, 4));
    return 0;
}
